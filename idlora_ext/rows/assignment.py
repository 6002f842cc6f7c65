"""The assignment step of k-means under a minimum cluster size: an exact minimum-cost flow on ``k`` nodes.

In C++ where there is a native module (``csrc/rows/assignment.cpp``), else in Python, with the same labels: costs are
integers, and ties go to the lower cluster, then to the lower row.
"""

from __future__ import annotations

import math
import operator
from heapq import heappop, heappush
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import native

__all__ = ["assign"]


def assign(distances: Tensor, min_size: int) -> Tensor:
    """``argmin_labels sum_i distances[i, labels_i]`` subject to ``|{i: labels_i = c}| >= min_size`` for every ``c``.

    The minimum is exact, as that of a minimum-cost flow, for costs rounded to 52 bits below the largest difference
    within a row. Only such differences matter: costs may be negative. Ties go to the lower cluster and the lower row.

    Args:
        distances: ``[d, k]`` float, finite: the cost of row ``i`` in cluster ``c``. Squared Euclidean distances make
            this the assignment step of k-means.
        min_size: the least number of rows of a cluster, from 0 to ``d / k``.

    Returns:
        ``labels [d]`` int64 on the device of ``distances``.

    Raises:
        TypeError: ``distances`` is no floating-point tensor, or ``min_size`` no integer.
        ValueError: a shape, size or value outside of the above.

    Source: Bradley, Bennett & Demiriz 2000, "Constrained K-Means Clustering", MSR-TR-2000-65, section 3.
    """
    check_matrix("assign", "distances", distances)
    check_sizes("assign", "distances", distances.shape[0], distances.shape[1], "min_size", min_size, least=0)
    D = distances.detach().to("cpu", torch.float64)
    return torch.from_numpy(assign_numpy(D.numpy(), min_size)).to(distances.device)


def assign_numpy(D: np.ndarray, min_size: int) -> np.ndarray:
    """:func:`assign` for ``D [d, k]`` float64 of a shape and for a size that are known to fit."""
    return solver().assign(D, min_size) if solver() else _assign(torch.from_numpy(D), min_size).numpy()


def solver() -> Any:
    """The native clustering solver, or None: the same results from the Python code."""
    return native.module and native.module.clustering


def _assign(D: Tensor, min_size: int) -> Tensor:
    if not len(D):
        return torch.zeros(0, dtype=torch.int64, device="cpu")
    regret = D - D.amin(1, keepdim=True)
    if not regret.isfinite().all():
        raise ValueError("assign: distances must be finite, got NaN, inf or differences that overflow")
    labels = D.argmin(1)
    size = torch.bincount(labels, minlength=D.shape[1])
    if int(size.min()) < min_size:
        labels = _fill_up(labels, size.tolist(), regret, min_size)
    return labels


def _fill_up(labels: Tensor, size: list[int], regret: Tensor, min_size: int) -> Tensor:
    """Optimal labels from those of the plain argmin, by successive cheapest paths from surplus to deficit.

    Nodes are the clusters. The edge a -> b costs min over rows i now in a of regret[i, b] - regret[i, a]: the cheapest
    way to hand a row of a to b. One step hands a row along every edge of a cheapest path from a cluster above min_size
    to one below it, so that only the sizes of the two ends change. There are Q steps, the sum of all deficits.

    Why the end is optimal. At the argmin no edge is negative, hence no cycle: the labels are optimal for their own
    sizes. A cheapest path keeps cycles non-negative (the invariant of minimum-cost flow), so the labels stay optimal
    for their sizes, and for the number of units sent. Sending more than Q never helps: what is sent beyond the deficits
    is a set of paths in the graph at the start, all of whose edges cost >= 0.

    Why the Q cheapest rows of an edge are enough. A path visits a at most once and takes one row from it, so before the
    last step at most Q - 1 of them have left. Rows that come to a on the way are pushed onto the heaps of a; rows that
    have left are dropped when they reach the top.
    """
    k = len(size)
    # Integers, so that sums along paths are exact and a cycle of cost zero cannot look negative.
    unit = math.ldexp(1.0, math.frexp(float(regret.max()))[1] - 1)  # a power of two: regret / unit is exact, below 2
    cost = (regret / unit * 2.0**51).round_().long()
    cost_of = cost.numpy()  # single rows are read faster from it
    Q = sum(max(min_size - n, 0) for n in size)

    others = [[b for b in range(k) if b != a] for a in range(k)]
    heaps: dict[tuple[int, int], list[tuple[int, int]]] = {}  # (a, b) -> (cost, row), cheapest on top
    for a in range(k):
        rows = (labels == a).nonzero().flatten()
        for b in others[a]:
            step, order = (cost[rows, b] - cost[rows, a]).sort(stable=True)
            heaps[a, b] = list(zip(step[:Q].tolist(), rows[order[:Q]].tolist(), strict=True))  # sorted is a heap
    now = labels.tolist()

    def cheapest(a: int, b: int) -> float:
        heap = heaps[a, b]
        while heap and now[heap[0][1]] != a:
            heappop(heap)
        return heap[0][0] if heap else math.inf

    edges = [{b: cheapest(a, b) for b in others[a]} for a in range(k)]
    for _ in range(Q):
        path = _cheapest_path(edges, size, min_size)
        handed = [heaps[hop][0][1] for hop in path]
        for (_, b), row in zip(path, handed, strict=True):
            now[row] = b
            costs = cost_of[row].tolist()
            for c in others[b]:
                heappush(heaps[b, c], (costs[c] - costs[b], row))
        size[path[0][0]] -= 1
        size[path[-1][1]] += 1
        for a in {cluster for hop in path for cluster in hop}:
            edges[a] = {b: cheapest(a, b) for b in others[a]}
    return torch.tensor(now, device="cpu")


def _cheapest_path(edges: list[dict[int, float]], size: list[int], min_size: int) -> list[tuple[int, int]]:
    """Bellman-Ford: the edges of a cheapest path from any cluster above ``min_size`` to any below."""
    length = [0 if n > min_size else math.inf for n in size]
    via = [-1] * len(size)
    improved = True
    while improved:  # ends, for no cycle is negative
        improved = False
        for a, out in enumerate(edges):
            for b, cost in out.items():
                if length[a] + cost < length[b]:
                    length[b], via[b], improved = length[a] + cost, a, True
    b = min((c for c, n in enumerate(size) if n < min_size), key=length.__getitem__)
    path = []
    while via[b] >= 0:
        path.append((via[b], b))
        b = via[b]
    return path[::-1]


def check_matrix(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{op}: {name} must be a floating-point tensor, got {got}")
    if value.ndim != 2 or value.shape[1] < 1:
        raise ValueError(f"{op}: {name} must have 2 dimensions, the second at least 1, got {list(value.shape)}")
    if value.is_meta:
        raise ValueError(f"{op}: {name} must hold values, got a tensor on the meta device; load the weights first")


def check_int(op: str, name: str, value: object, least: int) -> None:
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}") from None
    if number < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {number}")


def check_sizes(op: str, matrix: str, d: int, k: int, size_name: str, size: int, least: int = 1) -> None:
    check_int(op, "num_clusters", k, 1)
    check_int(op, size_name, size, least)
    if d < k * size:
        raise ValueError(f"{op}: {matrix} must have at least k * {size_name} = {k} * {size} = {k * size} rows, got {d}")
