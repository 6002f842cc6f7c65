"""SmolLM2-135M, with its real weights: outlier rows, massive activations, K and V too narrow for the rank."""

from __future__ import annotations

import pytest
import torch
from assets import gsm8k, smollm2
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import idlora_ext

pytestmark = pytest.mark.real_model


def test_trains_and_reloads_bit_for_bit(tmp_path):
    path = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = [row["prompt"] + "\n" + row["completion"] for row in gsm8k()[:8]]
    batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=48)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    def base():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def logits(model):
        with torch.no_grad():
            return model.eval()(**batch).logits

    model = base()
    untouched = logits(model)
    with pytest.warns(UserWarning, match=r"60 of 210 layers are too narrow.*v_proj \(d = 192: r = 48 instead of 64\)"):
        idlora_ext.apply(model, r=64, progress=False)
    assert torch.equal(logits(model), untouched)  # B = 0, and no biases

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
    losses = []
    for _ in range(4):
        loss = model.train()(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    trained = logits(model)
    assert not torch.equal(trained, untouched)
    model.save_pretrained(tmp_path)
    reloaded = base()
    reloaded.load_adapter(tmp_path)
    assert torch.equal(logits(reloaded), trained)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path)), trained)
    idlora_ext.remove(model)
    assert torch.equal(logits(model), untouched)
