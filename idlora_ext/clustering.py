"""Rows of a frozen weight as points: k-means with a minimum cluster size, and the choice of ``index``.

* :func:`assign` - the assignment step under the constraint: an exact minimum-cost flow on ``k`` nodes;
* :func:`constrained_kmeans` - the descent around it;
* :func:`select_rows` - ``index [k, r]``, the rows that become ``A_i = W[index_i, :]``.

The rows do not depend on the number of threads. Threads may change the last bits of a float64 matrix product, so
squared distances are rounded to a grid far above those bits, and far below anything that matters, before a decision is
taken. Ties go to the lower cluster, then to the lower row.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from heapq import heappop, heappush
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["SELECTIONS", "KMeansResult", "assign", "constrained_kmeans", "select_rows"]

SELECTIONS = ("nearest", "sequential", "random")

# Elements of W turned into float64 at a time: 8 MiB for the caches of a CPU, 128 MiB to amortise kernel launches.
_BLOCK_CPU, _BLOCK_OTHER = 1 << 20, 1 << 24
# The mean of so many rows is the origin of all points: near enough to the mean of all to take a common offset out.
_ORIGIN_ROWS = 64
# Squared distances keep this many bits below |x - origin|^2 + |c - origin|^2; a float64 product errs 16 bits later.
_DISTANCE_BITS = 36
# Centroid sums follow the rows that move; every so many iterations they start afresh, so that rounding cannot build up.
_RESUM_EVERY = 50
# Gains are shares of the inertia. A smaller one than this may be rounding; smaller ones than these end a stage.
_NO_GAIN, _STAGES = 1e-12, (3e-4, 3e-5, 0.0)


class KMeansResult(NamedTuple):
    """What :func:`constrained_kmeans` found; the tensors live where ``W`` lives."""

    labels: Tensor  # [d] int64, the cluster of each row
    centroids: Tensor  # [k, d_in] float64, the mean of each cluster
    distances: Tensor  # [d] float64, squared distance of each row to its centroid
    inertia: float  # the sum of distances
    n_iter: int  # iterations of the returned start
    converged: bool  # whether the stopping rule came before max_iter


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
    _check_matrix("assign", "distances", distances)
    _check_sizes("assign", "distances", distances.shape[0], distances.shape[1], "min_size", min_size, least=0)
    D = distances.detach().to("cpu", torch.float64)
    if not len(D):
        return torch.zeros(0, dtype=torch.int64, device=distances.device)
    regret = D - D.amin(1, keepdim=True)
    if not regret.isfinite().all():
        raise ValueError("assign: distances must be finite, got NaN, inf or differences that overflow")
    labels = D.argmin(1)
    size = torch.bincount(labels, minlength=D.shape[1])
    if int(size.min()) < min_size:
        labels = _fill_up(labels, size.tolist(), regret, min_size)
    return labels.to(distances.device)


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


class _Partition(NamedTuple):
    labels: Tensor  # [d], CPU
    size: Tensor  # [k], CPU, float64
    sums: Tensor  # [k, d_in], of the rows
    e: Tensor  # [k, d_in], centroids - origin
    inertia: float


class _Rows:
    """The rows x of W, read in float64 blocks, as points relative to an origin near their mean.

    |x - c|^2 = |x - o|^2 - 2 <x, e> + 2 <o, e> + |e|^2 with e = c - o: one product a pass serves all centroids, W is
    neither shifted nor squared again, and a large mean does not cancel digits.
    """

    def __init__(self, W: Tensor) -> None:
        # Strided rows would be gathered anew by every pass: a transposed W is copied once, in its own dtype.
        self.W = W.detach() if W.stride(1) == 1 else W.detach().contiguous()
        self.d, self.d_in = W.shape
        self.block = max(1, (_BLOCK_CPU if W.device.type == "cpu" else _BLOCK_OTHER) // self.d_in)
        self.buffer = torch.empty(min(self.block, self.d), self.d_in, dtype=torch.float64, device=W.device)
        self.origin = self.W[:_ORIGIN_ROWS].double().mean(0)
        norms = [torch.linalg.vector_norm(x.sub_(self.origin), dim=1) for _, x in self.blocks()]
        self.squares = torch.cat(norms).square_()  # |x - o|^2
        self.total = math.fsum(self.squares.tolist())  # not finite if an entry of W is not

    def blocks(self, rows: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """(positions, float64 rows), of all rows or of those listed; every block overwrites the one before."""
        for start in range(0, self.d if rows is None else len(rows), self.block):
            here = slice(start, start + self.block)
            x = self.W[here] if rows is None else self.W[rows[here]]
            yield here, self.buffer[: len(x)].copy_(x)

    def point(self, row: int) -> Tensor:
        return self.W[row].double() - self.origin

    def distances(self, e: Tensor) -> Tensor:
        """``[d, k]``, on the CPU: squared distances of all rows to the centroids ``origin + e``."""
        squares = e.square().sum(1)
        products = torch.cat([x @ e.T for _, x in self.blocks()])
        D = self.squares[:, None] - 2 * products + (2 * (e @ self.origin) + squares)
        scale = (self.squares + squares.max()).clamp_(min=1e-200)[:, None]
        grid = scale / torch.frexp(scale).mantissa * 2.0**-_DISTANCE_BITS  # a power of two: no further rounding
        return (D / grid).round_().mul_(grid).clamp_(min=0).cpu()

    def partition(self, labels: Tensor, k: int, last: _Partition | None) -> _Partition:
        """The clusters of ``labels``, none of them empty; reads only the rows whose label differs from the last one."""
        clusters = torch.arange(k, device="cpu")[:, None]
        if last is None:
            sums, moved, sign = self.buffer.new_zeros(k, self.d_in), None, (clusters == labels).double()
        else:
            sums, moved = last.sums.clone(), (labels != last.labels).nonzero().flatten()
            sign = (clusters == labels[moved]).double() - (clusters == last.labels[moved]).double()
            moved = moved.to(self.W.device)
        sign = sign.to(self.W.device)
        for here, x in self.blocks(moved):
            sums.addmm_(sign[:, here], x)
        size = torch.bincount(labels, minlength=k).double()
        e = sums / size.to(sums.device)[:, None] - self.origin
        inertia = self.total - float(size @ e.square().sum(1).cpu())  # within = total - between
        return _Partition(labels, size, sums, e, inertia)


def constrained_kmeans(
    W: Tensor,
    num_clusters: int,
    min_size: int,
    *,
    init: Tensor | None = None,
    n_init: int = 1,
    max_iter: int = 300,
    tol: float = 1e-4,
    seed: int = 0,
) -> KMeansResult:
    """``min_{labels, centroids} sum_i |W_i - centroids_{labels_i}|^2`` subject to ``|{i: labels_i = c}| >= min_size``.

    A local minimum. Every iteration is an :func:`assign`, after which each centroid is the mean of its rows, and lowers
    the inertia. What is assigned by goes from coarse to fine, each for as long as that gains enough:

    1. the distance, not squared: a few outlier rows should not decide where the first centroids go;
    2. nearly the change of the inertia when a row joins a cluster of ``n``, ``distance^2 * n / (n + 1)``, or leaves it,
       ``distance^2 * n / (n - 1)``. In thousands of dimensions a row pulls its own centroid so near that the squared
       distance alone soon sees no better cluster for it;
    3. the squared distance, Lloyd's step.

    The start is k-means++.

    Args:
        W: ``[d, d_in]``, any floating-point dtype, device and strides; finite. It is read in float64 blocks, without a
            float64 copy; only if single rows are strided (a transposed weight) is it copied, in its own dtype.
        num_clusters: ``k``, at least 1.
        min_size: the least number of rows of a cluster, at least 1, at most ``d / k``.
        init: ``[k, d_in]`` starting centroids instead of k-means++; ``n_init`` must then be 1.
        n_init: starts; the one with the least inertia is returned.
        max_iter: most iterations of a start.
        tol: a start ends when no step lowers the inertia, or when the squared shift of all centroids together is no
            more than ``tol`` times the mean variance of a feature (as in scikit-learn and k-means-constrained).
        seed: of the k-means++ draws, which are made on the CPU whatever the device of ``W``.

    Returns:
        :class:`KMeansResult`

    Raises:
        TypeError: ``W`` or ``init`` is no floating-point tensor, or a size no integer.
        ValueError: a shape, size or value outside of the above, or ``W`` on the meta device.

    Source: "ID-LoRA", arXiv 2602.20727, section 4.1; Bradley, Bennett & Demiriz 2000, "Constrained K-Means Clustering",
    MSR-TR-2000-65; for the second cost Hartigan & Wong 1979, "Algorithm AS 136".
    """
    op = "constrained_kmeans"
    _check_matrix(op, "W", W)
    _check_sizes(op, "W", W.shape[0], num_clusters, "min_size", min_size)
    _check_int(op, "n_init", n_init, 1)
    _check_int(op, "max_iter", max_iter, 1)
    if not tol >= 0:
        raise ValueError(f"{op}: tol must be >= 0, got {tol}")
    if init is not None:
        _check_matrix(op, "init", init)
        init = init.detach().to(W.device, torch.float64)
        if init.shape != (num_clusters, W.shape[1]) or not init.isfinite().all():
            expected = [num_clusters, W.shape[1]]
            raise ValueError(f"{op}: init must be finite and {expected}, got NaN, inf or {list(init.shape)}")
        if n_init != 1:
            raise ValueError(f"{op}: n_init must be 1 when init is given, got {n_init}")
    rows = _Rows(W)
    if not math.isfinite(rows.total):
        raise ValueError(f"{op}: W must be finite, got NaN, inf or values whose squares overflow float64")
    generator = torch.Generator("cpu").manual_seed(seed)
    results = []
    for _ in range(n_init):
        e = _kmeans_plus_plus(rows, num_clusters, generator) if init is None else init - rows.origin
        results.append(_descend(rows, e, min_size, max_iter, tol))
    return min(results, key=lambda result: result.inertia)


def _kmeans_plus_plus(rows: _Rows, k: int, generator: torch.Generator) -> Tensor:
    """Arthur & Vassilvitskii 2007: the next centroid is a row drawn by its squared distance from the nearest so far."""
    chosen = [int(torch.randint(rows.d, (), generator=generator, device="cpu"))]
    nearest = torch.full((rows.d,), math.inf, dtype=torch.float64, device="cpu")
    while len(chosen) < k:
        nearest = torch.minimum(nearest, rows.distances(rows.point(chosen[-1])[None])[:, 0])
        cumulative = nearest.cumsum(0)
        u = torch.rand((), dtype=torch.float64, generator=generator, device="cpu")
        if cumulative[-1] > 0:
            row = int(torch.searchsorted(cumulative, u * cumulative[-1], right=True))
        else:  # every row is a copy of one already chosen: any will do
            row = int(u * rows.d)
        chosen.append(min(row, rows.d - 1))
    return torch.stack([rows.point(row) for row in chosen])


def _costs(D: Tensor, now: _Partition) -> tuple[Tensor, Tensor, Tensor]:
    """What the three stages assign by."""
    own = now.labels[:, None]
    size = now.size[own]
    leave = D.gather(1, own) * size / (size - 1).clamp(min=1)
    change = (D * (now.size / (now.size + 1))).scatter_(1, own, leave)
    return D.sqrt(), D.lerp(change, 0.75), D  # not all of the change: rows that move together would overshoot


def _descend(rows: _Rows, e: Tensor, min_size: int, max_iter: int, tol: float) -> KMeansResult:
    """From the centroids ``origin + e``. An iteration costs one pass over W and one over the rows that moved."""
    k = len(e)
    now = rows.partition(assign(rows.distances(e).sqrt(), min_size), k, None)
    D = rows.distances(now.e)
    centre = now.size @ now.e.cpu() / rows.d
    tol *= (rows.total / rows.d - float(centre @ centre)) / rows.d_in  # times the mean variance of a feature
    stage, converged = 0, False
    for n_iter in range(1, max_iter + 1):
        for cost in _costs(D, now)[stage:]:
            after = rows.partition(assign(cost, min_size), k, now if n_iter % _RESUM_EVERY else None)
            gain = now.inertia - after.inertia
            if gain > _NO_GAIN * rows.total:
                break
        else:
            converged = True
            break
        stage += gain < _STAGES[stage] * rows.total
        shift = float((after.e - now.e).square().sum())
        now, D = after, rows.distances(after.e)
        if shift <= tol:
            converged = True
            break
    own = D.gather(1, now.labels[:, None])[:, 0]
    labels, own = now.labels.to(rows.W.device), own.to(rows.W.device)
    return KMeansResult(labels, now.e + rows.origin, own, math.fsum(own.tolist()), n_iter, converged)


def select_rows(W: Tensor, num_clusters: int, r: int, *, selection: str = "nearest", seed: int = 0) -> Tensor:
    """``index [k, r]``, all entries distinct: the rows of ``W`` that become the frozen ``A_i = W[index_i, :]``.

    * ``nearest`` (the method): :func:`constrained_kmeans` with ``min_size = r``, then from every cluster the ``r`` rows
      nearest to its centroid, nearest first (ties: the lower row first);
    * ``sequential`` (the paper's ablation SS): rows ``0 .. k*r - 1``, in order;
    * ``random`` (the paper's ablation RS): ``k*r`` distinct rows drawn uniformly by ``seed``.

    Args:
        W: ``[d, d_in]``, any floating-point dtype, device and strides; finite if ``selection`` is ``nearest``.
        num_clusters: ``k``, at least 1.
        r: the rank: rows per cluster, at least 1, at most ``d / k``.
        seed: of all draws, which are made on the CPU whatever the device of ``W``.

    Returns:
        ``index [k, r]`` int32 on the device of ``W``.

    Raises:
        TypeError: ``W`` is no floating-point tensor, or a size no integer.
        ValueError: a shape, size or value outside of the above, or ``W`` on the meta device.

    Source: "ID-LoRA", arXiv 2602.20727, section 4.1 and its ablations of the selection.
    """
    _check_matrix("select_rows", "W", W)
    _check_sizes("select_rows", "W", W.shape[0], num_clusters, "r", r)
    if selection not in SELECTIONS:
        raise ValueError(f"select_rows: selection must be one of {', '.join(SELECTIONS)}, got {selection!r}")
    k = num_clusters
    if selection == "nearest":
        result = constrained_kmeans(W, k, r, seed=seed)
        order = result.distances.argsort(stable=True)
        clusters = result.labels[order]
        index = torch.stack([order[clusters == c][:r] for c in range(k)])
    elif selection == "sequential":
        index = torch.arange(k * r, device="cpu").view(k, r)
    else:
        generator = torch.Generator("cpu").manual_seed(seed)
        index = torch.randperm(len(W), generator=generator, device="cpu")[: k * r].view(k, r)
    return index.to(W.device, torch.int32)


def _check_matrix(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{op}: {name} must be a floating-point tensor, got {got}")
    if value.ndim != 2 or value.shape[1] < 1:
        raise ValueError(f"{op}: {name} must have 2 dimensions, the second at least 1, got {list(value.shape)}")
    if value.is_meta:
        raise ValueError(f"{op}: {name} must hold values, got a tensor on the meta device; load the weights first")


def _check_int(op: str, name: str, value: object, least: int) -> None:
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}") from None
    if number < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {number}")


def _check_sizes(op: str, matrix: str, d: int, k: int, size_name: str, size: int, least: int = 1) -> None:
    _check_int(op, "num_clusters", k, 1)
    _check_int(op, size_name, size, least)
    if d < k * size:
        raise ValueError(f"{op}: {matrix} must have at least k * {size_name} = {k} * {size} = {k * size} rows, got {d}")
