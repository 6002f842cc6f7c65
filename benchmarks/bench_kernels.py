"""The CUDA kernels: times where there is a GPU, elsewhere the simulator's counters and the roofline model.

On a GPU: CUDA events, caches flushed, median with p20 and p80, bytes a second and percent of a measured copy, beside
the same maths in eager PyTorch and PEFT's LoRA. Without one: every launch is executed on simulated A100, H100 and B200
with all checks on, its results are compared with float64, and what it moved is compared with what no kernel can do
without (harness/limits.py). Modelled figures are called so.

    python benchmarks/bench_kernels.py [--quick] [--fresh] [--modelled] [--output FILE]

Results are kept shape by shape: a run that was stopped goes on where it was, unless the kernels have changed since.
Writes results/kernels.json, results/kernels.svg and the tables of KERNELS.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from harness import gpu_timing, kernel_figures, kernel_library, kernel_page, modelled
from harness.machine import describe
from harness.modelled import Shape
from tqdm import tqdm

SHAPES = [Shape(N, d) for d in (1024, 4096, 14336) for N in (1, 16, 512, 4096)] + [Shape(37, 1032, r=24)]
QUICK = [Shape(N, d) for d in (1024, 4096) for N in (1, 512)] + [Shape(37, 1032, r=24)]

RESULTS = Path(__file__).parent / "results"

# The orders of warps and of blocks: counters are taken under the first, checks run under all.
ORDERS = (("forward", "forward"), ("reverse", "reverse"), ("random:1", "random:2"))


def simulate(shapes: list[Shape], results: dict[str, Any], save: Callable[[], None]) -> None:
    """Adds to ``results``, by shape and setting, what the simulator counts and finds; ``save`` is called after each."""
    jobs = [
        (shape, device, order)
        for shape in sorted(shapes, key=lambda shape: shape.N * shape.d)
        for device in sorted(set(modelled.ARCHITECTURES.values()))
        for order in (ORDERS if device == modelled.ARCHITECTURES[kernel_figures.GOAL_DEVICE] else ORDERS[:1])
        if _name(device, order) not in results.get(str(shape), {})
    ]
    # The simulator reads its settings once a process: one for each, as many at work as there are cores.
    spawn = multiprocessing.get_context("spawn")
    processes = {s: ProcessPoolExecutor(1, spawn, _start, s) for s in {(device, order) for _, device, order in jobs}}

    def run(shape: Shape, device: str, order: tuple[str, str]) -> tuple[Shape, str, Any]:
        task = modelled.count if order == ORDERS[0] else modelled.check
        return shape, _name(device, order), processes[device, order].submit(task, shape).result()

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        waiting = [threads.submit(run, *job) for job in jobs]
        try:
            for done in tqdm(as_completed(waiting), total=len(waiting), unit="run", disable=not waiting):
                shape, name, result = done.result()
                results.setdefault(str(shape), {})[name] = result
                save()
        finally:
            for future in waiting:
                future.cancel()
            for process in processes.values():
                process.shutdown(cancel_futures=True)


def _name(device: str, order: tuple[str, str]) -> str:
    return f"{device} {order[0]}"


def _start(device: str, order: tuple[str, str]) -> None:
    os.environ |= {"PTXSIM_DEVICE": device, "PTXSIM_SCHEDULE": order[0], "PTXSIM_CTA_ORDER": order[1]}
    torch.set_num_threads(1)


def tabulate(shapes: list[Shape], counted: dict[str, Any], usage: modelled.Usage) -> list[dict[str, Any]]:
    """The figures of every shape, forward and backward."""
    rows = []
    for shape in shapes:
        runs = counted[str(shape)]
        findings = sum(run for run in runs.values() if isinstance(run, int))
        by_device = {name.split()[0]: run for name, run in runs.items() if not isinstance(run, int)}
        rows += [kernel_figures.figures(shape, phase, by_device, findings, usage) for phase in ("forward", "backward")]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few small shapes; writes nothing without --output")
    parser.add_argument("--fresh", action="store_true", help="forget what earlier runs counted")
    parser.add_argument("--modelled", action="store_true", help="counters and model even if there is a GPU")
    parser.add_argument("--output", type=Path, metavar="FILE", help="(default: results/kernels.json)")
    args = parser.parse_args()
    shapes = QUICK if args.quick else SHAPES

    if torch.cuda.is_available() and not args.modelled:
        rows = [gpu_timing.measure(shape, phase) for shape in tqdm(shapes) for phase in ("forward", "backward")]
        print(kernel_page.timing_table(rows))
        output = args.output or (None if args.quick else RESULTS / "kernels_timed.json")
        write(output, {"machine": describe(), "device_copy": gpu_timing.copy_rate(), "results": rows})
        return
    if reason := kernel_library.missing():
        raise SystemExit(f"Neither a GPU nor the simulator: {reason}.")

    kernel_library.build()
    source, partial = modelled.source_hash(), kernel_library.BUILD / "counted.json"
    kept = json.loads(partial.read_text()) if partial.is_file() and not args.fresh else {}
    results = kept["results"] if kept.get("source") == source else {}
    simulate(shapes, results, lambda: write(partial, {"source": source, "results": results}))
    usage = modelled.resources()
    rows = tabulate(shapes, results, usage)
    print(kernel_page.goal_table(rows))
    output = args.output or (None if args.quick else RESULTS / "kernels.json")
    write(
        output,
        {
            "machine": describe(),
            "tools": modelled.tools(),
            "source": source,
            "goals": [g._asdict() for g in kernel_figures.GOALS],
            "results": rows,
            "resources": usage,
        },
    )
    if output is not None and not args.quick:
        kernel_page.write(rows, usage, output.with_suffix(".svg"))


def write(output: Path | None, content: dict[str, Any]) -> None:
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
