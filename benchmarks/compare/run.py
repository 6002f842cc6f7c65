"""One experiment in one fresh process: load, adapt, train, evaluate, write one JSON file.

    python -m benchmarks.compare.run '{"method": "lora-r8", "task": "math", "lr": 0.001}' --output result.json

The same for every method: AdamW (betas 0.9 and 0.999) without weight decay, gradients clipped to norm 1, the rate up
a line over the first tenth of the steps and down a cosine to zero (as transformers.Trainer would), rows in an order
that the seed alone decides, and no dropout. The seed also decides how adapters start. Only the rate differs.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness.machine import describe, keep_freed_memory
from safetensors.torch import save_file
from transformers import get_cosine_schedule_with_warmup, set_seed
from transformers.utils import logging

import idlora_ext

from . import ROOT, methods, objectives
from .alpha import AlphaStatistics
from .experiment import Experiment, model_path, write_json
from .tasks import Part, load_task

CURVE_SHARE = 4  # one of so many held-out rows, at the points between the first and the last


def measure(experiment: Experiment) -> dict[str, Any]:
    """Run it. The result is complete, or there is an exception."""
    started, cpu_started = time.perf_counter(), time.process_time()
    settings, key = experiment.settings(), experiment.key()
    behaviour, version = methods.behaviour(experiment.adapter), commit()  # what is loaded, whatever changes meanwhile
    device = experiment.device
    path = model_path(experiment.model)
    parts = load_task(experiment.task, path, experiment.length)
    set_seed(experiment.seed)
    model = objectives.load(path, getattr(torch, experiment.dtype)).to(device)
    adapting = time.process_time()
    model = methods.apply(model, seeded(experiment.adapter, experiment.seed))
    adapting = time.process_time() - adapting

    optimizer = methods.optimizer(model, experiment.adapter, experiment.lr) if trainable(model) else None
    steps = experiment.steps if optimizer else 0
    held_out = {0: evaluate(model, parts, experiment)}
    alpha = AlphaStatistics(model)
    alpha_curve = {0: alpha.measure(parts, device)}
    train: dict[str, Any] = {"loss": [], "gradient_norm": [], "adapt_cpu_seconds": adapting}
    if optimizer:
        schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(steps / 10), steps)
        rows = torch.cat([part.train for part in parts.values()])
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(experiment.seed))
        points = {steps * i // 4 for i in (1, 2, 3)} - {0}
        wall = cpu = 0.0
        for step in range(steps):
            model.train()
            chosen = order[torch.arange(step * experiment.batch, (step + 1) * experiment.batch) % len(order)]
            begun, cpu_begun = time.perf_counter(), time.process_time()
            loss = objectives.losses(model, rows[chosen].to(device)).mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trainable(model), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            train["loss"].append(loss.item())
            train["gradient_norm"].append(norm.item())
            wall, cpu = wall + time.perf_counter() - begun, cpu + time.process_time() - cpu_begun
            if step + 1 in points:
                held_out[step + 1] = evaluate(model, parts, experiment, CURVE_SHARE)
                alpha_curve[step + 1] = alpha.measure(parts, device)
            if not math.isfinite(train["loss"][-1]):
                break  # diverged: that is its result
        held_out[steps] = evaluate(model, parts, experiment)
        alpha_curve[steps] = alpha.measure(parts, device)
        train |= {"wall_seconds": wall, "cpu_seconds": cpu, "tokens": steps * experiment.batch * experiment.length}
    model.eval()
    accuracies = {name: objectives.accuracy(model, part, device) for name, part in parts.items()}
    return {
        "key": key,
        "settings": settings,
        "behaviour": behaviour,
        "variant": experiment.variant,
        "metrics": {
            "held_out_loss": {"before": mean(held_out[0]), "after": mean(held_out[steps])},
            "held_out_curve": {
                str(step): {"share_of_rows": 1 if step in (0, steps) else 1 / CURVE_SHARE, **losses}
                for step, losses in held_out.items()
            },
            "accuracy": {name: value for name, value in accuracies.items() if value is not None},
            "trainable_parameters": sum(parameter.numel() for parameter in trainable(model)),
            "adapter_bytes": adapter_bytes(model),
            "alpha": {str(step): found for step, found in alpha_curve.items() if found},
        },
        "train": train,
        "run": {
            "wall_seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu_started,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "peak_cuda_bytes": torch.cuda.max_memory_allocated() if device != "cpu" else None,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": version,
        },
        "machine": describe() | {"idlora_ext": idlora_ext.__version__},
    }


def seeded(adapter: methods.Adapter, seed: int) -> methods.Adapter:
    """Where a configuration has a seed of its own, the experiment's."""
    name = {"IdLoraConfig": "seed", "VeraConfig": "projection_prng_key", "RandLoraConfig": "projection_prng_key"}
    kind = adapter["kind"]
    return adapter | {name[kind]: seed} if kind in name else adapter


def trainable(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@torch.no_grad()
def evaluate(model: Any, parts: dict[str, Part], experiment: Experiment, share: int = 1) -> dict[str, float]:
    """Held-out loss of each part, a mean over the labels of the first ``1 / share`` of its rows."""
    model.eval()
    means = {}
    for name, part in parts.items():
        batches = part.held_out[: math.ceil(len(part.held_out) / share)].split(experiment.batch)
        tokens = torch.cat([objectives.losses(model, batch.to(experiment.device)) for batch in batches])
        means[name] = tokens.double().mean().item()
    return means


def mean(losses: dict[str, float]) -> float:
    """Over parts, so that each counts the same."""
    return sum(losses.values()) / len(losses)


def adapter_bytes(model: Any) -> int:
    """Of the file that keeps what was trained: PEFT's, or the trained tensors alone."""
    with tempfile.TemporaryDirectory() as folder:
        if hasattr(model, "peft_config"):
            model.save_pretrained(folder)
            return Path(folder, "adapter_model.safetensors").stat().st_size
        tensors = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_file(tensors, Path(folder, "trained.safetensors"))
        return Path(folder, "trained.safetensors").stat().st_size


def commit() -> str | None:
    """Of the working tree, with ``-dirty`` if it has changes; None outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    run = subprocess.run(command, capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=json.loads, help="fields of Experiment, as JSON")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # saves a fifth of a step
    logging.disable_progress_bar()
    try:
        result = measure(Experiment(**options.experiment))
    except (ValueError, OSError) as error:
        sys.exit(f"{options.output.stem}: {error}")
    write_json(options.output, result)


if __name__ == "__main__":
    main()
