"""The native CPU kernels against the plain-PyTorch default kernels: layer shapes of SmolLM2-135M and Llama-3-8B.

In three forms: the package's default (one constant, scaled rows, less their mean), the same with a bounded router, and
the paper's. Both are called as ops of the dispatcher, in inference mode, in turn (A B A B), with router and B in
float32, PEFT's default. Before it is timed, each result is compared with float64: the error of the native kernel may be
twice that of the default one, three times for gradients (root mean squares: one token has too few numbers to take a
maximum of). Times are medians over rounds; their spread, 20th and 80th percentile, is in the file.

    python benchmarks/bench_cpu.py [--quick] [--threads N] [--rounds N] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness.machine import describe, keep_freed_memory
from torch import Tensor
from tqdm import tqdm

from idlora_ext import native

MODELS = {"SmolLM2-135M": (576, 192, 1536), "Llama-3-8B": (4096, 1024, 14336)}  # out-features of the linear layers
RANKS = (32, 128)
TOKENS = (1, 8, 64, 512, 2048)
DTYPES = (torch.float32, torch.bfloat16)
FORMS = ("default", "bounded", "paper")
K, S, SCALING = 4, 2, 1.0
ROUND_SECONDS = 2e-3  # a round repeats short calls for about so long
OUTPUTS = ("y", "dy0", "dT", "dB")


class Case(NamedTuple):
    form: str
    model: str
    d: int
    r: int
    N: int
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.form:<7} {dtype:<9} {self.model:<13} {self.d:>6} {self.r:>4} {self.N:>5}"


class Problem(NamedTuple):
    y0: Tensor
    dy: Tensor
    index: Tensor
    router: Tensor
    B: Tensor
    mean: Tensor | None
    row_scale: Tensor | None
    bounded: bool


def cases(quick: bool) -> list[Case]:
    """Every form, shape, rank and number of tokens; a layer of fewer than ``K r`` columns has no such rank."""
    tokens, models = (TOKENS[:3], {"SmolLM2-135M": (576, 192)}) if quick else (TOKENS, MODELS)
    return [
        Case(form, model, d, r, N, dtype)
        for form in FORMS
        for dtype in DTYPES
        for model, widths in models.items()
        for d in widths
        for r in RANKS
        for N in tokens
        if K * r <= d
    ]


def problem(case: Case, seed: int = 0) -> Problem:
    """With an update of the size of the activation."""
    g = torch.Generator().manual_seed(seed)
    y0 = torch.randn(case.N, case.d, generator=g).to(case.dtype)
    dy = torch.randn(case.N, case.d, generator=g).to(case.dtype)
    index = torch.randperm(case.d, generator=g)[: K * case.r].view(K, case.r).int()
    B = torch.randn(case.d // S, case.r // S, generator=g) / (case.r // S) ** 0.5
    router = torch.randn(1, case.r, generator=g) / (K * case.r) ** 0.5
    if case.form == "paper":
        return Problem(y0, dy, index, router, B, None, None, False)
    mean, row_scale = torch.randn(case.d, generator=g), torch.rand(K, case.r, generator=g) + 0.5
    bounded = case.form == "bounded"
    return Problem(y0, dy, index, router if bounded else torch.full((1,), 0.5), B, mean, row_scale, bounded)


def calls(prefix: str, p: Problem) -> dict[str, Callable[[], Any]]:
    adapt = getattr(torch.ops.idlora, f"{prefix}adapt").default
    adapt_backward = getattr(torch.ops.idlora, f"{prefix}adapt_backward").default
    offset = p.mean, SCALING, p.mean is not None

    def forward() -> Any:
        return adapt(p.y0, p.index, p.router, p.B, *offset, p.row_scale, p.bounded, save_x=True)

    x = forward()[1]
    return {
        "forward": forward,
        "backward": lambda: adapt_backward(p.dy, x, p.index, p.router, p.B, SCALING, p.row_scale, p.bounded),
    }


def results(prefix: str, p: Problem) -> list[Tensor]:
    run = calls(prefix, p)
    return [run["forward"]()[0], *run["backward"]()]


def verify(case: Case) -> dict[str, float]:
    """The error of each output over that of the default kernel; ends the benchmark if the rule is broken."""
    squares = dict.fromkeys(OUTPUTS, (0.0, 0.0))
    for seed in range(max(1, 64 // case.N)):  # few numbers, such as the weight of one token, are right by chance
        for name, (error, allowed) in errors(case, problem(case, seed)).items():
            squares[name] = squares[name][0] + error, squares[name][1] + allowed
    ratios = {}
    for name, (error, allowed) in squares.items():
        ratios[name] = round((error / allowed) ** 0.5, 3) if allowed else 0.0
        if not error <= (2 if name == "y" else 3) ** 2 * allowed:
            raise SystemExit(f"{case}: the error of {name} is {ratios[name]} of the default kernel's")
    return ratios


def errors(case: Case, p: Problem) -> dict[str, tuple[float, float]]:
    """Mean square errors of each output, ours and the default kernel's."""
    wide = {name: getattr(p, name).double() for name in ("y0", "dy", "router", "B")}
    truth = results("default_", p._replace(**wide, mean=p.mean if p.mean is None else p.mean.double()))
    found = {}
    for name, ours, default, true in zip(OUTPUTS, results("", p), results("default_", p), truth, strict=True):
        error, allowed = ((t.double() - true).square().mean().item() for t in (ours, default))
        if true.numel() == 1:  # a sum over all tokens: what rounding of its terms gives
            terms = p.dy.double() * (truth[0] - p.y0.double()) / p.router.double()
            allowed = max(allowed, (torch.finfo(case.dtype).eps * terms.norm().item()) ** 2)
        found[name] = error, allowed
    return found


def seconds(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def interleaved(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds a call of each contender, one value a round."""
    repeats = {
        name: max(1, int(ROUND_SECONDS / min(seconds(call, 1) for _ in range(3)))) for name, call in contenders.items()
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            times[name].append(seconds(call, repeats[name]))
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Microseconds."""
    deciles = statistics.quantiles(times, n=10)
    values = {"median": statistics.median(times), "p20": deciles[1], "p80": deciles[7]}
    return {name: round(value * 1e6, 2) for name, value in values.items()}


def measure(case: Case, rounds: int) -> dict[str, Any]:
    p = problem(case)
    row: dict[str, Any] = {
        **case._asdict(),
        "dtype": str(case.dtype).removeprefix("torch."),
        "errors": verify(case),
    }
    ours, default = calls("", p), calls("default_", p)
    for phase in ("forward", "backward"):
        times = interleaved({"native": ours[phase], "default": default[phase]}, rounds)
        row[phase] = {name: summary(values) for name, values in times.items()}
        row[phase]["ratio"] = round(row[phase]["default"]["median"] / row[phase]["native"]["median"], 3)
    return row


def report(case: Case, row: dict[str, Any]) -> str:
    columns = "   ".join(
        f"{row[phase]['native']['median']:>9,.0f} {row[phase]['default']['median']:>9,.0f} {row[phase]['ratio']:>6.2f}"
        for phase in ("forward", "backward")
    )
    slower = [phase for phase in ("forward", "backward") if row[phase]["ratio"] <= 1]
    return f"{case}   {columns}" + (f"   SLOWER: {', '.join(slower)}" if slower else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small layers, few tokens: does it run?")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15, help="at least 2 (default: 15)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cpu.json")
    options = parser.parse_args()
    if native.module is None:
        raise SystemExit(f"There is no native module to measure: {native.reason}")
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]
    if load > 0.5:
        print(
            f"This machine is not idle: the load of the last minute is {load:.1f}. Times and ratios will be distorted."
        )

    print(f"Microseconds a call, {options.threads} threads; k = {K}, s = {S}; ratio: default / native, medians")
    print(f"{'':<50}   {'forward':^26}   {'backward':^26}")
    head = f"{'form':<7} {'dtype':<9} {'model':<13} {'d':>6} {'r':>4} {'N':>5}"
    print(head + 2 * f"   {'native':>9} {'default':>9} {'ratio':>6}")
    rows = []
    with torch.inference_mode(), tqdm(cases(options.quick), unit="case", disable=None) as bar:
        for case in bar:
            rows.append(measure(case, options.rounds))
            bar.write(report(case, rows[-1]))
    for form, phase in product(FORMS, ("forward", "backward")):
        ratios = [row[phase]["ratio"] for row in rows if row["form"] == form]
        faster = sum(ratio > 1 for ratio in ratios)
        print(
            f"{form}, {phase}: native is faster in {faster} of {len(ratios)} cases, by {min(ratios):.2f} to "
            f"{max(ratios):.2f}, {statistics.geometric_mean(ratios):.2f} in the geometric mean"
        )
    settings = {
        "k": K,
        "s": S,
        "parameters": "float32",
        "instruction_set": native.module.cpu_capability(),
        "save_x": True,
        "rounds": options.rounds,
        "times": "microseconds",
    }
    report_file = {"machine": describe(), "load_before": round(load, 2), "settings": settings, "results": rows}
    options.output.write_text(json.dumps(report_file, indent=1) + "\n")


if __name__ == "__main__":
    main()
