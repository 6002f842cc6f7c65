"""A causal language model and transformers' Trainer: train, save the adapter, load it again.

python examples/causal_lm_trainer.py
"""

import tempfile

import torch
from assets import gsm8k, smollm2
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import idlora_ext

NAME = smollm2()  # a directory with a small real model; any causal language model's name or directory will do


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(NAME)
    model = AutoModelForCausalLM.from_pretrained(NAME, dtype=torch.float32)
    idlora_ext.apply(model, r=32)  # the default, 128, is for models of 3B and more
    print(str(idlora_ext.summary(model)).splitlines()[-1])

    texts = [f"{row['prompt']}\n{row['completion']}" for row in gsm8k()[:4]]  # to be learnt by heart
    rows = [{"input_ids": tokenizer(text, truncation=True, max_length=32).input_ids} for text in texts]
    with tempfile.TemporaryDirectory() as directory:
        options = {"max_steps": 3, "learning_rate": 5e-4, "per_device_train_batch_size": 4, "logging_steps": 1}
        trainer = Trainer(
            model,
            TrainingArguments(directory, report_to="none", save_strategy="no", **options),
            train_dataset=rows,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        model.save_pretrained(directory)  # adapter_config.json and adapter_model.safetensors, nothing else
        reloaded = AutoModelForCausalLM.from_pretrained(NAME, dtype=torch.float32)
        reloaded.load_adapter(directory)

    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model.eval()(**prompt).logits, reloaded.eval()(**prompt).logits)
    assert losses[-1] < losses[0]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, and the reloaded adapter gives the same logits")
    print(tokenizer.decode(reloaded.generate(**prompt, max_new_tokens=12, do_sample=False)[0]))


if __name__ == "__main__":
    main()
