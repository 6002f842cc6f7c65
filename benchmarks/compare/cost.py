"""What training and decoding cost, beside the frozen model alone: time, memory, file. Verified before it is timed.

    python -m benchmarks.compare.cost                                  # about half an hour on two cores
    python -m benchmarks.compare.cost --device cuda --dtype bfloat16   # the same on a GPU

Every measurement is a fresh process, and they take turns (A B C A B C ..), so that what else a machine does falls on
all alike; given are medians, and 20th and 80th percentiles. A step is the forward pass, the backward pass down to the
embeddings, and the optimizer's step, on random tokens; the frozen model's has no optimizer. On a CPU time is the
process's own (user and system, all threads), which a busy machine disturbs least; wall time stands beside it in the
file. While it is taken, the process keeps the memory that it frees; peak memory is of steps before that.

Decoding is timed beside a frozen twin in the same process, token by token in turn: processes differ by more than the
adapters do.
"""

from __future__ import annotations

import argparse
import functools
import json
import operator
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from harness.machine import describe, keep_freed_memory
from harness.saved_activations import saved_activations
from harness.table import table
from torch import Tensor, nn
from tqdm import tqdm
from transformers import set_seed
from transformers.utils import logging

from . import RESULTS, ROOT, methods, objectives
from .experiment import MODEL, model_path, write_json
from .methods import METHODS
from .run import adapter_bytes, commit, trainable

FROZEN, LORA, PEER, OURS = "none", "lora-r8", "miss-r8", "idlora-r32-pivoted"
DEFAULT = (
    FROZEN, LORA, PEER, OURS, "idlora-r32-bounded", "idlora-r32-centered", "idlora-r32", "lora-r32", "miss-r32",
    "idlora-r128-centered", "dora-r8",
)  # fmt: skip
NEW_TOKENS = 64


def measure(method: str, options: argparse.Namespace) -> dict[str, Any]:
    """One method in this process."""
    set_seed(0)
    path = model_path(options.model)
    model = objectives.load(path, getattr(torch, options.dtype)).to(options.device)
    vocabulary = model.config.vocab_size
    ids = torch.randint(0, vocabulary, (options.batch, options.length), generator=torch.Generator().manual_seed(0))
    ids = ids.to(options.device)
    with torch.no_grad():
        expected = model(input_ids=ids[:1]).logits

    adapter = METHODS[method].adapter
    adapting = time.process_time()
    model = methods.apply(model, adapter)
    adapting = time.process_time() - adapting
    with torch.no_grad():  # untrained, it must be the frozen model
        if not torch.allclose(model(input_ids=ids[:1]).logits, expected, rtol=1e-3, atol=1e-3):
            raise ValueError(f"{method}: the untrained adapter changes the model's output")

    model.train()
    model.enable_input_require_grads()
    optimizer = methods.optimizer(model, adapter, lr=1e-6) if trainable(model) else None

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()

    step()  # whatever is made once
    if options.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    keep_freed_memory()  # or any method's step takes 0.3 to 2 s in the system, for 200,000 pages
    step()
    steps = [timed(step, options.device) for _ in range(options.steps)]
    saved = saved_activations(model, input_ids=ids, labels=ids, use_cache=False)
    twin = objectives.load(path, getattr(torch, options.dtype)).to(options.device)  # not before the peak was taken
    decoding = decode([model.eval(), twin.eval()], ids[:1, :32], options.device)
    return {
        "step_cpu_seconds": statistics.median(cpu for cpu, _ in steps),
        "step_wall_seconds": statistics.median(wall for _, wall in steps),
        **decoding,
        "saved_bytes": saved.bytes,
        "peak_bytes": torch.cuda.max_memory_allocated() if options.device != "cpu" else peak,
        "optimizer_bytes": sum(t.numel() * t.element_size() for t in _state(optimizer)),
        "trainable_parameters": sum(p.numel() for p in trainable(model)),
        "adapter_bytes": adapter_bytes(model) if trainable(model) else 0,
        "adapt_cpu_seconds": adapting,
    }


def timed(run: Callable[[], None], device: str) -> tuple[float, float]:
    """Process CPU seconds and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.process_time() - cpu, time.perf_counter() - wall


@torch.no_grad()
def decode(pair: list[nn.Module], ids: Tensor, device: str) -> dict[str, float]:
    """Seconds for a token of the first model, and over the second's: medians.

    Greedy, with a cache, batch 1; both get the first model's tokens, and which begins alternates.
    """
    outputs: list[Any] = [None, None]
    times: list[list[tuple[float, float]]] = [[], []]

    def run(i: int, ids: Tensor) -> None:
        cache = outputs[i] and outputs[i].past_key_values
        outputs[i] = pair[i](input_ids=ids, past_key_values=cache, use_cache=True)

    for token in range(NEW_TOKENS + 1):
        for i in (0, 1) if token % 2 else (1, 0):
            times[i].append(timed(functools.partial(run, i, ids), device))
        ids = outputs[0].logits[:, -1:].argmax(-1)
    mine, frozen = (list(zip(*of[1:], strict=True)) for of in times)  # not the prompt
    figures = {}
    for clock, own, base in zip(("cpu", "wall"), mine, frozen, strict=True):
        figures[f"decode_{clock}_seconds"] = statistics.median(own)
        figures[f"decode_{clock}_over_frozen"] = statistics.median(map(operator.truediv, own, base))
    return figures


def _state(optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    states = optimizer.state.values() if optimizer else ()
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]


def earlier(output: Path, settings: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs that are there of these settings on this machine, of whichever methods.

    Raises:
        ValueError: the file is of other settings, or from another machine.
    """
    if not output.is_file():
        return {}
    result = json.loads(output.read_text())
    for name in settings.keys() - {"methods", "repeats"}:
        if (before := result["settings"].get(name)) != settings[name]:
            raise ValueError(
                f"{output} is of {name}={before!r}, not {settings[name]!r}: give another --output, or --again"
            )
    if result["machine"] != describe():
        raise ValueError(f"{output} is from another machine or other versions: give another --output, or --again")
    runs: dict[str, list[dict[str, Any]]] = result["runs"]
    return runs


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Method -> figure -> median; of times the percentiles too, and the median of ratios within one turn."""
    summary = {}
    for method, mine in runs.items():
        figures: dict[str, Any] = {name: statistics.median(run[name] for run in mine) for name in mine[0]}
        for name in [name for name in figures if name.startswith(("step", "decode"))]:
            values = sorted(run[name] for run in mine)
            figures[name + "_p20_p80"] = [values[round(q * (len(values) - 1))] for q in (0.2, 0.8)]
            for base in (FROZEN, LORA, PEER):
                if base in runs and name.startswith("step"):
                    ratios = [run[name] / other[name] for run, other in zip(mine, runs[base], strict=False)]
                    figures[f"{name}_over_{base}"] = statistics.median(ratios)
        summary[method] = figures
    return summary


def page(result: dict[str, Any]) -> str:
    """The table of a results file."""
    summary, settings = result["summary"], result["settings"]
    clock = "wall" if settings["device"] != "cpu" else "cpu"
    step = f"step_{clock}_seconds"
    lines = []
    for method, f in summary.items():
        ratios = [f"{f[f'{step}_over_{base}']:.3f}" if base in summary else "" for base in (FROZEN, LORA, PEER)]
        overhead = ""
        if {FROZEN, LORA} <= summary.keys() and method != FROZEN:
            frozen = summary[FROZEN][step]
            overhead = f"{(f[step] - frozen) / (summary[LORA][step] - frozen):.2f}"
        low, high = f[step + "_p20_p80"]
        lines.append([
            method, f"{f['trainable_parameters']:,}", f"{f[step]:.2f} ({low:.2f} to {high:.2f})", *ratios, overhead,
            f"{1000 * f[f'decode_{clock}_seconds']:.1f}", f"{f[f'decode_{clock}_over_frozen']:.3f}",
            f"{f['saved_bytes'] / 1e6:,.0f}", f"{f['peak_bytes'] / 2**30:.2f}", f"{f['optimizer_bytes'] / 1e6:.1f}",
            f"{f['adapter_bytes'] / 1e6:.1f}", f"{f['adapt_cpu_seconds']:.1f}",
        ])  # fmt: skip
    head = ["method", "parameters", f"{clock} s/step", "/ frozen", "/ LoRA r=8", "/ MiSS r=8", "overhead / LoRA r=8's"]
    head += [
        "decode, ms/token",
        "/ frozen",
        "saved for backward, MB",
        "peak, GiB",
        "optimizer, MB",
        "file, MB",
        "adapt, s",
    ]
    return table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(DEFAULT), metavar="NAME")
    parser.add_argument("--repeats", type=int, default=7, help="fresh processes of each method (default: 7)")
    parser.add_argument("--steps", type=int, default=3, help="timed in each (default: 3)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default=MODEL, help=f"{MODEL}, or a directory")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, default=RESULTS / "cost.json", help="(default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="measure anew what is there already")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        torch.set_num_threads(options.threads)
        logging.disable_progress_bar()
        print(json.dumps(measure(options.one, options)))
        return

    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    settings = {name: value for name, value in vars(options).items() if name not in ("one", "output", "again")}
    try:
        runs = {} if options.again else earlier(options.output, settings)
    except ValueError as error:
        parser.error(str(error))
    version = commit()  # before the file that is written changes the tree
    for turn, method in tqdm(list(product(range(options.repeats), options.methods)), unit="run"):
        if turn < len(runs.get(method, ())):
            continue
        command = [sys.executable, "-m", "benchmarks.compare.cost", *sys.argv[1:], "--one", method]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{method}: {done.stderr.strip()}")
        runs.setdefault(method, []).append(json.loads(done.stdout.splitlines()[-1]))
        result = {
            "machine": describe(),
            "commit": version,
            "settings": settings,
            "summary": summarise(runs),
            "runs": runs,
        }
        write_json(options.output, result)  # each as it comes: a long measurement that is stopped goes on from there
    print(page(json.loads(options.output.read_text())))


if __name__ == "__main__":
    main()
