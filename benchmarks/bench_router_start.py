"""How should the router start? ``z = sum_i <T_i, x_i> x_i`` is quadratic in the activation, so its size matters.

Real activations have outlier tokens (in SmolLM2, two layers put out vectors of norm 24,000 where 30 is usual, nearly
all of it in one coordinate), and ``T`` starts random while ``B`` starts at zero, so ``T`` alone sets the first steps.
Every candidate trains SmolLM2-135M on GSM8K for a few steps from the same rows; LoRA stands beside them. Reported: the
norm of the first gradient, the worst training loss after the warm-up, and the held-out loss at the end, as medians over
seeds.
Runs that are in the results file already are not repeated.

    python benchmarks/bench_router_start.py            # about half an hour on two cores
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from harness.machine import describe
from harness.small_model import evaluate, fit, load, rows
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers.utils import logging

import idlora_ext
from idlora_ext.layer.layer import IdLoraLayer

# A normal draw n, the norms w [k, r] of the chosen rows, k and r: what T starts as.
STARTS: dict[str, Callable[[Tensor, Tensor, int, int], Tensor]] = {
    "n": lambda n, w, k, r: n,
    "n / sqrt(k r)": lambda n, w, k, r: n / (k * r) ** 0.5,
    "n / (mean|w| sqrt(k r))": lambda n, w, k, r: n / (w.mean() * (k * r) ** 0.5),
    "n / (|w_j| sqrt(k r))": lambda n, w, k, r: n / (w.mean(0) * (k * r) ** 0.5),
    "n / (mean|w| r)": lambda n, w, k, r: n / (w.mean() * r),
    "n / (|w_j| r)": lambda n, w, k, r: n / (w.mean(0) * r),
    "n / (1000 mean|w| r)": lambda n, w, k, r: n / (1000 * w.mean() * r),
    "1 / (mean|w| sqrt(k r))": lambda n, w, k, r: torch.ones_like(n) / (w.mean() * (k * r) ** 0.5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--r", type=int, nargs="+", default=[32, 128], help="ranks of ID-LoRA")
    parser.add_argument("--lr", type=float, nargs="+", default=[5e-4])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "router_start.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message=".*too narrow")
    logging.disable_progress_bar()

    train, held_out = rows()
    before = evaluate(load(), held_out)
    print(f"held-out loss before training {before:.4f}")
    settings = {"steps": options.steps, "rows": [len(train), len(held_out)]}
    report: dict = {"machine": describe(), "settings": settings, "held_out_before": before, "runs": []}
    if options.output.is_file():
        earlier = json.loads(options.output.read_text())
        if earlier["settings"] != settings:
            raise SystemExit(f"{options.output} holds runs with other settings: {earlier['settings']}")
        report = earlier
    done = {(run["start"], run["r"], run["lr"], run["seed"]): run for run in report["runs"]}
    plan = [("LoRA r=32", 0)] + [(start, r) for r in options.r for start in options.start]
    print(f"{'start of T':<26} {'r':>4} {'lr':>7} {'first |grad|':>13} {'worst loss':>11} {'held-out loss':>14}")
    bar = tqdm(total=len(plan) * len(options.lr) * options.seeds, unit="run", disable=None)
    for start, r in plan:
        for lr in options.lr:
            results = []
            for seed in range(options.seeds):
                key = (start, r, lr, seed)
                if key not in done:
                    model = load()
                    if r:
                        idlora_ext.apply(model, preset="paper", r=r, progress=False)
                        start_routers(model, STARTS[start], seed)
                    else:
                        inject_adapter_in_model(LoraConfig(r=32, target_modules="all-linear"), model)
                    result = fit(model, train, lr, options.steps, seed) | {"held_out": evaluate(model, held_out)}
                    done[key] = dict(zip(("start", "r", "lr", "seed"), key, strict=True)) | result
                    report["runs"] = list(done.values())
                    options.output.write_text(json.dumps(report, indent=1) + "\n")
                results.append(done[key])
                bar.update()
            first, worst, after = (statistics.median(x[key] for x in results) for key in ("first", "worst", "held_out"))
            bar.write(f"{start:<26} {r or '':>4} {lr:>7g} {first:>13.3f} {worst:>11.3f} {after:>14.4f}")
    bar.close()


@torch.no_grad()
def start_routers(model: nn.Module, start: Callable[[Tensor, Tensor, int, int], Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, IdLoraLayer):
            router, index = layer.idlora_adapter["default"].router, layer.idlora_adapter["default"].index
            norms = layer.get_base_weight()[index.long()].norm(dim=-1)
            router.copy_(start(torch.randn(router.shape, generator=generator), norms, *index.shape))


if __name__ == "__main__":
    main()
