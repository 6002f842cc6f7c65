"""A short training run of a small language model on real text: SmolLM2-135M on worked problems of GSM8K."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from assets import gsm8k, smollm2


def rows(length: int = 64) -> tuple[Tensor, Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    ids = torch.tensor(tokenizer("\n\n".join(f"{x['prompt']}\n{x['completion']}" for x in gsm8k()))["input_ids"])
    ids = ids[: len(ids) // length * length].view(-1, length)
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    return ids[16:], ids[:16]


def load() -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)


def fit(model: nn.Module, train: Tensor, lr: float, steps: int, seed: int, batch: int = 8, warmup: int = 4) -> dict:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    norms, losses = [], []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warmup)
        ids = train[order[(torch.arange(batch) + step * batch) % len(order)]]
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(parameters, 1.0).item())
        optimizer.step()
        losses.append(loss.item())
    return {"first": norms[0], "largest": max(norms), "worst": max(losses[warmup:]), "losses": losses}


@torch.no_grad()
def evaluate(model: nn.Module, held_out: Tensor) -> float:
    return statistics.fmean(model(input_ids=ids, labels=ids).loss.item() for ids in held_out.split(8))
