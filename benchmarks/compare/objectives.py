"""What a model is loaded as, and what is asked of it: the next token, or, of an encoder, the class of a headline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from idlora_ext.tools.data import IGNORED

from .tasks import Part


def is_encoder(model: Path) -> bool:
    """Whether a directory holds no causal language model."""
    architectures = json.loads((model / "config.json").read_text()).get("architectures") or []
    return not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)


def load(model: Path, dtype: torch.dtype) -> nn.Module:
    """A causal language model, or an encoder with a new classifier for two classes, which torch's seed decides."""
    kind = AutoModelForSequenceClassification if is_encoder(model) else AutoModelForCausalLM
    loaded: nn.Module = kind.from_pretrained(model, dtype=dtype)
    loaded.config.use_cache = False
    return loaded


def losses(model: Any, rows: Tensor) -> Tensor:
    """The loss of every token there is a label for, or of every class. ``rows``: ``[batch, 2, length]``."""
    ids, labels = rows[:, 0], rows[:, 1]
    if classifies(model):
        return F.cross_entropy(_class_logits(model, ids), labels[:, 0], reduction="none")
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1).float()
    labels = labels[:, 1:].flatten()
    kept = labels != IGNORED
    return F.cross_entropy(logits[kept], labels[kept], reduction="none")


@torch.no_grad()
def accuracy(model: Any, part: Part, device: str, batch: int = 32) -> float | None:
    """How often the right class, or choice, is the likeliest; None of what has neither."""
    if classifies(model):
        batches = part.held_out.to(device).split(batch)
        right = [_class_logits(model, rows[:, 0]).argmax(-1) == rows[:, 1, 0] for rows in batches]
        return torch.cat(right).double().mean().item()
    return choice_accuracy(model, part.problems, device) if part.problems else None


def classifies(model: Any) -> bool:
    """Whether a model has a classifier in place of an output for every token."""
    return hasattr(model, "classifier") or hasattr(model, "score")


def _class_logits(model: Any, ids: Tensor) -> Tensor:
    mask = ids != model.config.pad_token_id
    longest = int(mask.sum(1).max())
    logits: Tensor = model(input_ids=ids[:, :longest], attention_mask=mask[:, :longest]).logits
    return logits.float()


@torch.no_grad()
def choice_accuracy(
    model: Any, problems: list[tuple[list[int], list[list[int]], int]], device: str, batch: int = 16
) -> float:
    """How often the right choice is the likeliest, by the sum over its tokens."""
    scores = [[0.0] * len(choices) for _, choices, _ in problems]
    reads: dict[tuple[int, ...], list[tuple[int, int]]] = {}  # choices of one token are all read off the prompt
    for i, (prompt, choices, _) in enumerate(problems):
        for j, choice in enumerate(choices):
            reads.setdefault((*prompt, *choice[:-1]), []).append((i, j))
    rows = sorted(reads, key=len)  # rows of a batch are about equally long
    for at in range(0, len(rows), batch):
        block = rows[at : at + batch]
        ids = torch.zeros(len(block), len(block[-1]), dtype=torch.long)  # padded on the right, which none attends to
        for row, read in zip(ids, block, strict=True):
            row[: len(read)] = torch.tensor(read)
        for read, logits in zip(block, model(input_ids=ids.to(device)).logits, strict=True):
            for i, j in reads[read]:
                prompt, choice = problems[i][0], problems[i][1][j]
                likelihoods = logits[len(prompt) - 1 : len(read)].float().log_softmax(-1).cpu()
                scores[i][j] = float(likelihoods.gather(1, torch.tensor(choice)[:, None]).sum())
    right = [
        max(range(len(s)), key=s.__getitem__) == answer for s, (_, _, answer) in zip(scores, problems, strict=True)
    ]
    return sum(right) / len(right)
