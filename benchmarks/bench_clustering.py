"""Row clustering against ``k-means-constrained``: same matrix, same start, same stopping rule, objective and seconds.

The two are fitted in turn (A B A B). It ends with an error if a cluster is too small or our inertia the larger one.
"heavy" matrices have a few outlier rows, as real weights do: there the size constraint is at work.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/bench_clustering.py [--quick] [--repeats N] [--output F]

With more threads, CPU seconds also count threads that wait for one another: on a busy machine that is most of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from k_means_constrained import KMeansConstrained
from machine import describe
from torch import Tensor
from tqdm import tqdm

from idlora_ext.clustering import constrained_kmeans

K, MIN_SIZE = 4, 128
SHAPES = [(1024, 4096), (4096, 4096), (4096, 14336), (14336, 4096)]
QUICK = [(1024, 1024)]


def gaussian(d: int, d_in: int) -> Tensor:
    return torch.randn(d, d_in, generator=torch.Generator().manual_seed(0))


def heavy(d: int, d_in: int) -> Tensor:
    """Rows of log-normal norms: the largest are outliers that would make clusters of their own."""
    return gaussian(d, d_in) * torch.randn(d, 1, generator=torch.Generator().manual_seed(1)).exp()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small shape: does it run?")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "clustering.json")
    options = parser.parse_args()
    cases = [(kind, shape) for shape in (QUICK if options.quick else SHAPES) for kind in (gaussian, heavy)]
    print(f"k = {K}, minimum size {MIN_SIZE}; medians of {options.repeats}, process CPU seconds (wall seconds)")
    print(f"{'matrix':<22} {'ours':>16} {'k-means-constrained':>20} {'ratio':>6} {'iterations':>11} {'inertia':>9}")
    results = []
    bar = tqdm(total=2 * options.repeats * len(cases), unit="fit", disable=None)
    for kind, (d, d_in) in cases:
        W = kind(d, d_in)
        start = W[torch.randperm(d, generator=torch.Generator().manual_seed(2))[:K]]
        seconds: dict[str, list[tuple[float, float]]] = {"ours": [], "peer": []}
        for _ in range(options.repeats):
            ours = timed(seconds["ours"], lambda: constrained_kmeans(W, K, MIN_SIZE, init=start))  # noqa: B023
            bar.update()
            peer = timed(
                seconds["peer"],
                lambda: KMeansConstrained(K, size_min=MIN_SIZE, init=start.numpy(), n_init=1).fit(W.numpy()),  # noqa: B023
            )
            bar.update()
        theirs = torch.from_numpy(peer.labels_).long()
        for labels in (ours.labels, theirs):
            if labels.bincount(minlength=K).min() < MIN_SIZE:
                raise SystemExit(f"{kind.__name__} {d} x {d_in}: a cluster is too small")
        inertia = inertia_of(W, ours.labels) / inertia_of(W, theirs)
        if inertia > 1 + 1e-6:
            raise SystemExit(f"{kind.__name__} {d} x {d_in}: our inertia is {inertia:.8f} times theirs")
        cpu = {name: statistics.median(c for c, _ in values) for name, values in seconds.items()}
        wall = {name: statistics.median(w for _, w in values) for name, values in seconds.items()}
        bar.write(
            f"{kind.__name__ + f' {d} x {d_in}':<22} {cpu['ours']:>7.2f} ({wall['ours']:>5.2f}) "
            f"{cpu['peer']:>11.2f} ({wall['peer']:>5.2f}) {cpu['peer'] / cpu['ours']:>6.1f} "
            f"{f'{ours.n_iter} / {peer.n_iter_}':>11} {inertia:>9.6f}"
        )
        results.append(
            {
                "matrix": kind.__name__,
                "shape": [d, d_in],
                "cpu_and_wall_seconds": seconds,
                "ratio_cpu": cpu["peer"] / cpu["ours"],
                "ratio_wall": wall["peer"] / wall["ours"],
                "iterations": {"ours": ours.n_iter, "peer": int(peer.n_iter_)},
                "smallest_cluster": {"ours": int(ours.labels.bincount().min()), "peer": int(theirs.bincount().min())},
                "inertia_ours_over_peer": inertia,
            }
        )
    bar.close()
    report = {"machine": describe(), "k": K, "min_size": MIN_SIZE, "repeats": options.repeats, "results": results}
    options.output.write_text(json.dumps(report, indent=1) + "\n")


def timed(seconds: list[tuple[float, float]], fit: Callable[[], Any]) -> Any:
    cpu, wall = time.process_time(), time.perf_counter()
    result = fit()
    seconds.append((time.process_time() - cpu, time.perf_counter() - wall))
    return result


def inertia_of(W: Tensor, labels: Tensor) -> float:
    """``sum_i |W_i - mean of its cluster|^2`` in float64, by the labels alone."""
    return sum(float((x := W[labels == c].double()).sub_(x.mean(0)).square_().sum()) for c in labels.unique())


if __name__ == "__main__":
    main()
