"""Supervised fine-tuning with TRL's SFTTrainer: the configuration goes where a LoraConfig would.

pip install trl
python examples/sft_trl.py
"""

import tempfile

import torch
from assets import gsm8k, smollm2
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from idlora_ext import IdLoraConfig

NAME = smollm2()  # a directory with a small real model; any causal language model's name or directory will do
ROLES = {"prompt": "user", "completion": "assistant"}


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(NAME)
    rows = gsm8k()[:2]  # to be learnt by heart
    chats = [{key: [{"role": role, "content": row[key]}] for key, role in ROLES.items()} for row in rows]
    with tempfile.TemporaryDirectory() as directory:
        options = {"max_steps": 4, "learning_rate": 5e-4, "per_device_train_batch_size": 2, "logging_steps": 1}
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(NAME, dtype=torch.float32),
            args=SFTConfig(directory, max_length=96, report_to="none", bf16=False, **options),
            train_dataset=Dataset.from_list(chats),
            processing_class=tokenizer,
            peft_config=IdLoraConfig(r=32, task_type="CAUSAL_LM"),
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trainer.save_model(directory)
        reloaded = AutoPeftModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(trainer.model.eval()(**prompt).logits, reloaded.eval()(**prompt).logits)
    assert losses[-1] < losses[0]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, and the reloaded adapter gives the same logits")


if __name__ == "__main__":
    main()
