"""Row clustering, native and in Python, against ``k-means-constrained``; and how long it takes for a whole Llama-3-8B.

First each matrix is fitted by all in turn (A B C A B C), on one thread: same start, same stopping rule. It ends with an
error if a cluster is too small, our inertia the larger one, or native and Python labels differ. "heavy" matrices have
outlier rows, as real weights do: there the size constraint is at work.

Then the rows of one layer of each shape of Llama-3-8B are chosen on two threads (bfloat16, k-means++ included), and, as
by default, pivots of the whole weight and their scales. The time of the model is extrapolated from that sample: the sum
over shapes of the number of such layers times the median.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/bench_clustering.py [--quick] [--repeats N] [--output F]

With more threads, CPU seconds also count threads that wait for one another: on a busy machine that is most of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from harness.machine import describe
from k_means_constrained import KMeansConstrained
from torch import Tensor
from tqdm import tqdm

from idlora_ext import native
from idlora_ext.rows.kmeans import constrained_kmeans
from idlora_ext.rows.row_scale import row_scale
from idlora_ext.rows.selection import select_rows

K, MIN_SIZE = 4, 128
SHAPES = [(1024, 4096), (4096, 4096), (4096, 14336), (14336, 4096)]
QUICK = [(1024, 1024)]
# Linear layers of Llama-3-8B: 32 blocks with q and o, k and v, gate and up, down.
LLAMA = {(4096, 4096): 64, (1024, 4096): 64, (14336, 4096): 64, (4096, 14336): 32}
LLAMA_THREADS = 2

MODULE = native.module
OURS = ("native", "python") if MODULE else ("python",)
CHOICES = (*OURS, "pivoted")
Seconds = list[tuple[float, float]]  # CPU and wall


def gaussian(d: int, d_in: int) -> Tensor:
    return torch.randn(d, d_in, generator=torch.Generator().manual_seed(0))


def heavy(d: int, d_in: int) -> Tensor:
    """Rows of log-normal norms: the largest are outliers that would make clusters of their own."""
    return gaussian(d, d_in) * torch.randn(d, 1, generator=torch.Generator().manual_seed(1)).exp()


KINDS = (gaussian, heavy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small shape: does it run?")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "clustering.json")
    options = parser.parse_args()
    machine = describe()
    if not MODULE:
        print(f"Without the native module: {native.reason}.")
    load = [os.getloadavg()]
    torch.set_num_threads(1)
    results = compare(QUICK if options.quick else SHAPES, options.repeats)
    load.append(os.getloadavg())
    torch.set_num_threads(LLAMA_THREADS)
    llama = extrapolate(dict.fromkeys(QUICK, 1) if options.quick else LLAMA, options.repeats)
    load.append(os.getloadavg())
    report = {
        "machine": machine,
        "load_before_between_after": load,
        "k": K,
        "min_size": MIN_SIZE,
        "repeats": options.repeats,
        "threads": 1,
        "results": results,
        "llama_3_8b_extrapolated_from_a_sample": llama,
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n")


def compare(shapes: list[tuple[int, int]], repeats: int) -> list[dict[str, Any]]:
    print(f"k = {K}, minimum size {MIN_SIZE}, 1 thread; medians of {repeats}, process CPU seconds (wall seconds)")
    names = (*OURS, "k-means-constrained")
    print(f"{'matrix':<22}" + "".join(f"{name:>20}" for name in names) + f"{'iterations':>12}{'inertia':>10}")
    results = []
    for kind, (d, d_in) in tqdm([(kind, shape) for shape in shapes for kind in KINDS], unit="matrix", disable=None):
        W = kind(d, d_in)
        start = W[torch.randperm(d, generator=torch.Generator().manual_seed(2))[:K]]
        peer = KMeansConstrained(K, size_min=MIN_SIZE, init=start.numpy(), n_init=1)
        seconds: dict[str, Seconds] = {name: [] for name in names}
        for _ in range(repeats):
            fits = {}
            for name in OURS:
                with solver(name):
                    fits[name] = timed(seconds[name], lambda: constrained_kmeans(W, K, MIN_SIZE, init=start))  # noqa: B023
            timed(seconds["k-means-constrained"], lambda: peer.fit(W.numpy()))  # noqa: B023
        ours, theirs = fits[OURS[0]], torch.from_numpy(peer.labels_).long()
        case = f"{kind.__name__} {d} x {d_in}"
        for labels in (ours.labels, theirs):
            if labels.bincount(minlength=K).min() < MIN_SIZE:
                raise SystemExit(f"{case}: a cluster is too small")
        if not torch.equal(ours.labels, fits["python"].labels):
            raise SystemExit(f"{case}: native and Python labels differ")
        inertia = inertia_of(W, ours.labels) / inertia_of(W, theirs)
        if inertia > 1 + 1e-6:
            raise SystemExit(f"{case}: our inertia is {inertia:.8f} times theirs")
        cpu, wall = medians(seconds, 0), medians(seconds, 1)
        cells = (f"{f'{cpu[name]:.3f} ({wall[name]:.3f})':>20}" for name in names)
        tqdm.write(f"{case:<22}{''.join(cells)}{f'{ours.n_iter} / {peer.n_iter_}':>12}{inertia:>10.6f}")
        results.append(
            {
                "matrix": kind.__name__,
                "shape": [d, d_in],
                "cpu_and_wall_seconds": seconds,
                "ratio_cpu": {name: cpu["k-means-constrained"] / cpu[name] for name in OURS},
                "ratio_wall": {name: wall["k-means-constrained"] / wall[name] for name in OURS},
                "iterations": {"ours": ours.n_iter, "peer": int(peer.n_iter_)},
                "smallest_cluster": {"ours": int(ours.labels.bincount().min()), "peer": int(theirs.bincount().min())},
                "inertia_ours_over_peer": inertia,
            }
        )
    return results


def extrapolate(layers: dict[tuple[int, int], int], repeats: int) -> dict[str, Any]:
    count = sum(layers.values())
    print(f"\nRows of one layer, {LLAMA_THREADS} threads, bfloat16; medians of {repeats} seeds, wall seconds")
    print(f"{'matrix':<22}{'layers':>7}" + "".join(f"{f'{name} (range)':>26}" for name in CHOICES))
    results = []
    totals: dict[str, dict[str, float]] = {kind.__name__: dict.fromkeys(CHOICES, 0.0) for kind in KINDS}
    for kind, (d, d_in) in tqdm([(kind, shape) for shape in layers for kind in KINDS], unit="matrix", disable=None):
        W = kind(d, d_in).bfloat16()
        seconds: dict[str, Seconds] = {name: [] for name in CHOICES}
        for seed in range(repeats):
            index = {}
            for name in OURS:
                with solver(name):
                    index[name] = timed(seconds[name], lambda: select_rows(W, K, MIN_SIZE, seed=seed))  # noqa: B023
            if not torch.equal(index[OURS[0]], index["python"]):
                raise SystemExit(f"{kind.__name__} {d} x {d_in}: native and Python rows differ")
            timed(seconds["pivoted"], lambda: pivoted(W, seed))  # noqa: B023
        wall, cells = medians(seconds, 1), ""
        for name in CHOICES:
            totals[kind.__name__][name] += layers[d, d_in] * wall[name]
            walls = [w for _, w in seconds[name]]
            cells += f"{f'{wall[name]:.3f} ({min(walls):.3f} to {max(walls):.3f})':>26}"
        tqdm.write(f"{f'{kind.__name__} {d} x {d_in}':<22}{layers[d, d_in]:>7}{cells}")
        results.append(
            {
                "matrix": kind.__name__,
                "shape": [d, d_in],
                "layers": layers[d, d_in],
                "cpu_and_wall_seconds": seconds,
            }
        )
    for kind, total in totals.items():
        cells = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in total.items())
        print(f"all {count} layers {kind}, extrapolated from a sample: {cells}")
    return {
        "formula": "sum over shapes of layers * median wall seconds of one layer",
        "layers": count,
        "threads": LLAMA_THREADS,
        "dtype": "bfloat16",
        "total_seconds": totals,
        "sample": results,
    }


def pivoted(W: Tensor, seed: int) -> Tensor:
    return row_scale(W, select_rows(W, K, MIN_SIZE, selection="pivoted_qr_whole", seed=seed))


@contextmanager
def solver(name: str) -> Iterator[None]:
    """With or without the native module."""
    native.module = MODULE if name == "native" else None
    try:
        yield
    finally:
        native.module = MODULE


def timed(seconds: Seconds, fit: Callable[[], Any]) -> Any:
    cpu, wall = time.process_time(), time.perf_counter()
    result = fit()
    seconds.append((time.process_time() - cpu, time.perf_counter() - wall))
    return result


def medians(seconds: dict[str, Seconds], which: int) -> dict[str, float]:
    return {name: statistics.median(pair[which] for pair in values) for name, values in seconds.items()}


def inertia_of(W: Tensor, labels: Tensor) -> float:
    """``sum_i |W_i - mean of its cluster|^2`` in float64, by the labels alone."""
    return sum(float((x := W[labels == c].double()).sub_(x.mean(0)).square_().sum()) for c in labels.unique())


if __name__ == "__main__":
    main()
