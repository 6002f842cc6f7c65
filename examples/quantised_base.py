"""Fine-tune SmolLM2-135M in 4 bits: the base layers stay packed, the adapter works on what they return.

pip install bitsandbytes
python examples/quantised_base.py
"""

import tempfile

import torch
from assets import gsm8k, smollm2
from peft import prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import idlora_ext


def load_base() -> torch.nn.Module:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(smollm2(), quantization_config=config, device_map="auto")
    for module in model.modules():  # bitsandbytes packs weights for evaluation on some CPUs: no gradient passes then
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    problems = [tokenizer(f"{p['prompt']}\n{p['completion']}", return_tensors="pt").input_ids for p in gsm8k()[:7]]
    model = prepare_model_for_kbit_training(load_base(), use_gradient_checkpointing=False)
    idlora_ext.apply(model, r=64, layers_to_transform=[26, 27, 28, 29])  # rows are chosen from dequantised weights
    print(idlora_ext.summary(model))
    held_out, *training = [ids[:, :64].to(model.device) for ids in problems]

    def evaluate(model: torch.nn.Module) -> float:
        with torch.no_grad():
            return model.eval()(input_ids=held_out, labels=held_out).loss.item()

    before = evaluate(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    for ids in training:
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = evaluate(model)

    with tempfile.TemporaryDirectory() as directory:
        idlora_ext.save(model, directory)
        again = evaluate(idlora_ext.load(load_base(), directory))
    assert after < before
    assert abs(again - after) < 1e-4
    print(f"held-out loss: {before:.3f} before, {after:.3f} after 6 steps, {again:.3f} saved and loaded")


if __name__ == "__main__":
    main()
