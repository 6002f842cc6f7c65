"""Two processes train one adapter: the rows are chosen once and shared, the gradients are averaged (DDP).

    torchrun --nproc-per-node 2 examples/two_processes.py

It runs on the CPU with a small random model in some seconds; started with plain ``python`` it uses one process.
"""

import os
import tempfile

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import idlora_ext


def main() -> None:
    rank = int(os.environ.get("RANK", 0))
    if "RANK" in os.environ:
        dist.init_process_group("gloo")  # before apply, which shares the layers out over the ranks
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    )
    idlora_ext.apply(model, r=16, num_clusters=2, progress=rank == 0)  # every rank calls it, with the same settings

    rows = [{"input_ids": torch.arange(i, i + 16) % 64, "labels": torch.arange(i, i + 16) % 64} for i in range(64)]
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            output_dir=directory,
            max_steps=30,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        trainer.save_model(directory)  # the main process writes
        if rank == 0:
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; saved {sorted(os.listdir(directory))}")
            assert losses[-1] < losses[0]
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
