"""An adaptive budget: a rank for each layer of a model, for as many parameters as one rank for all.

    python -m benchmarks.compare.budget                      # on math; writes budget.json, for idlora-r32-budget
    python -m benchmarks.compare.budget --model minilm-l6    # on headlines

``r_l ~ sqrt(g_l)``, ``g_l`` the mean over the entries of ``B_l`` of ``|dL/dB_l|`` at the start, where ``B = 0``: Adam
moves each entry by the learning rate whatever its gradient, so that the loss falls at first by the rate times
``sum_l size(B_l) g_l``. The root, since what a layer gains with each further rank falls (``r_l ~ g_l`` was worse).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from idlora_ext.layer.layer import IdLoraLayer

from . import methods, objectives
from .experiment import ENCODER, MODEL, Experiment, model_path, write_json
from .methods import BUDGETS, METHODS
from .studies import ABLATED, base_experiment
from .tasks import load_task

UNIFORM = METHODS[ABLATED].adapter  # what it is compared with
BATCHES = 8  # of the base experiment, in an order that seed 0 decides


def gradients(base: Experiment) -> dict[str, tuple[float, int, int]]:
    """Layer -> mean of ``|dL/dB|`` over its entries, their number, and the largest rank that fits it."""
    path = model_path(base.model)
    torch.manual_seed(0)
    model = methods.apply(objectives.load(path, getattr(torch, base.dtype)), UNIFORM)
    layers = {module.name: module for module in model.modules() if isinstance(module, IdLoraLayer)}
    rows = torch.cat([part.train for part in load_task(base.task, path, base.length).values()])
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    model.train()
    for chosen in order[: BATCHES * base.batch].split(base.batch):
        objectives.losses(model, rows[chosen]).mean().backward()
    found = {}
    for name, layer in layers.items():
        B, index = layer.idlora_adapter["default"].B, layer.idlora_adapter["default"].index
        assert B.grad is not None
        found[name] = (B.grad.abs().mean().item() / BATCHES, B.numel(), layer.out_features // len(index))
    return found


def allocate(found: dict[str, tuple[float, int, int]], r: int, s: int) -> dict[str, int]:
    """Layer -> rank, a multiple of ``s``, at least ``r / 8``: as large as the parameters of ``r`` for all allow."""

    def ranks(factor: float) -> dict[str, int]:
        wanted = {name: min(factor * gradient**0.5, widest) for name, (gradient, _, widest) in found.items()}
        return {name: max(r // 8, int(rank)) // s * s for name, rank in wanted.items()}

    def size(chosen: dict[str, int]) -> float:
        return sum(numel * chosen[name] / r for name, (_, numel, _) in found.items())

    low, high = 0.0, max(widest for *_, widest in found.values()) / min(gradient for gradient, *_ in found.values())
    for _ in range(100):
        factor = (low + high) / 2
        low, high = (factor, high) if size(ranks(factor)) <= size(dict.fromkeys(found, r)) else (low, factor)
    return ranks(low)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help=f"{MODEL}, {ENCODER}, or a directory")
    options = parser.parse_args()
    allocated = allocate(gradients(base_experiment(options.model)), UNIFORM["r"], UNIFORM["rank_boost"])
    write_json(BUDGETS, json.loads(BUDGETS.read_text()) | {Path(options.model).name: allocated})
    for name, rank in allocated.items():
        print(f"{rank:4d}  {name}")


if __name__ == "__main__":
    main()
