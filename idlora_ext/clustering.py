"""Rows of a frozen weight as points: k-means with a minimum cluster size, and the choice of ``index``.

* :func:`assign` - the assignment step under the constraint: an exact minimum-cost flow on ``k`` nodes;
* :func:`constrained_kmeans` - the descent around it;
* :func:`select_rows` - ``index [k, r]``, the rows that become ``A_i = W[index_i, :]``.

On the CPU the native module, where there is one, makes the passes over ``W`` and the assignments; Python does the same
everywhere else. All that is small is on the host, in numpy: threads would cost more than they do.

The rows depend neither on the native module nor on the number of threads. Both may change the last bits of a float64
sum, so squared distances are rounded to a grid far above those bits, and far below anything that matters, before a
decision is taken. Ties go to the lower cluster, then to the lower row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from .assignment import assign, assign_numpy, check_int, check_matrix, check_sizes, solver
from .pivoting import pivoted_rows

__all__ = ["CLUSTERED", "SELECTIONS", "KMeansResult", "Selection", "assign", "constrained_kmeans", "select_rows"]

Selection = Literal["pivoted_qr_whole", "pivoted_qr", "nearest", "sequential", "random"]
SELECTIONS: tuple[Selection, ...] = get_args(Selection)
CLUSTERED: tuple[Selection, ...] = ("pivoted_qr", "nearest")  # each A_i is of rows of one cluster

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


class _Partition(NamedTuple):
    labels: np.ndarray  # [d]
    size: np.ndarray  # [k]
    sums: np.ndarray  # [k, d_in], of the rows
    e: np.ndarray  # [k, d_in], centroids - origin
    inertia: float


class _Rows:
    """The rows x of W as points relative to an origin o near their mean, read by three kinds of passes.

    |x - c|^2 = |x - o|^2 - 2 <x, e> + 2 <o, e> + |e|^2 with e = c - o: one product a pass serves all centroids, W is
    neither shifted nor squared again, and a large mean does not cancel digits.
    """

    def __init__(self, W: Tensor) -> None:
        # Strided rows would be gathered anew by every pass: a transposed W is copied once, in its own dtype.
        self.W = W.detach() if W.stride(1) == 1 else W.detach().contiguous()
        self.d, self.d_in = W.shape
        first = np.arange(self.d) < _ORIGIN_ROWS
        self.origin = np.zeros((1, self.d_in))
        self.move(np.full(self.d, -1), first - 1, self.origin)
        self.origin = self.origin[0] / first.sum()
        self.squares = self.squares_from_origin()  # |x - o|^2
        with np.errstate(over="ignore"):
            self.total = float(self.squares.sum())  # not finite if an entry of W is not

    @cached_property
    def buffer(self) -> Tensor:
        block = max(1, (_BLOCK_CPU if self.W.device.type == "cpu" else _BLOCK_OTHER) // self.d_in)
        return torch.empty(min(block, self.d), self.d_in, dtype=torch.float64, device=self.W.device)

    def blocks(self, rows: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """(positions, float64 rows), of all rows or of those listed; every block overwrites the one before."""
        for start in range(0, self.d if rows is None else len(rows), len(self.buffer)):
            here = slice(start, start + len(self.buffer))
            x = self.W[here] if rows is None else self.W[rows[here]]
            yield here, self.buffer[: len(x)].copy_(x)

    def on_device(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(self.W.device)

    def point(self, row: int) -> np.ndarray:
        return self.W[row].double().cpu().numpy() - self.origin

    def squares_from_origin(self) -> np.ndarray:
        """``[d]``: ``|x - o|^2``."""
        origin = self.on_device(self.origin)
        norms = [torch.linalg.vector_norm(x.sub_(origin), dim=1) for _, x in self.blocks()]
        return torch.cat(norms).square_().cpu().numpy()

    def distances(self, e: np.ndarray) -> np.ndarray:
        """``[d, k]``: squared distances of all rows to the centroids ``origin + e``."""
        e_T = self.on_device(e).T
        products = torch.cat([x @ e_T for _, x in self.blocks()]).cpu().numpy()
        squares = (e * e).sum(1)
        D = self.squares[:, None] - 2 * products + (2 * (e * self.origin).sum(1) + squares)
        exponent = np.frexp(np.maximum(self.squares + squares.max(), 1e-200))[1]
        grid = np.ldexp(1.0, exponent - _DISTANCE_BITS)[:, None]  # powers of two: no further rounding
        return np.maximum(np.round(D / grid) * grid, 0)

    def move(self, before: np.ndarray, after: np.ndarray, sums: np.ndarray) -> None:
        """``sums [k, d_in]`` follow the rows from one label to the next; reads only those that move. -1: no cluster."""
        moved = (before != after).nonzero()[0]
        clusters = np.arange(len(sums))[:, None]
        sign = self.on_device((clusters == after[moved]).astype(float) - (clusters == before[moved]))
        change = torch.zeros(sums.shape, dtype=torch.float64, device=self.W.device)
        for here, x in self.blocks(self.on_device(moved) if len(moved) < self.d else None):
            change.addmm_(sign[:, here], x)
        sums += change.cpu().numpy()

    def partition(self, labels: np.ndarray, k: int, last: _Partition | None) -> _Partition:
        """The clusters of ``labels``, none of them empty."""
        sums = np.zeros((k, self.d_in)) if last is None else last.sums.copy()
        self.move(np.full(self.d, -1) if last is None else last.labels, labels, sums)
        size = np.bincount(labels, minlength=k)
        e = sums / size[:, None] - self.origin
        inertia = self.total - float((size * (e * e).sum(1)).sum())  # within = total - between
        return _Partition(labels, size, sums, e, inertia)


class _NativeRows(_Rows):
    """The same passes in C++, which read W in its own dtype."""

    DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

    @cached_property
    def array(self) -> np.ndarray:
        return (self.W.view(torch.uint16) if self.W.dtype == torch.bfloat16 else self.W).numpy()

    def squares_from_origin(self) -> np.ndarray:
        return solver().row_squares(self.array, self.origin, torch.get_num_threads())

    def distances(self, e: np.ndarray) -> np.ndarray:
        threads = torch.get_num_threads()
        return solver().row_distances(self.array, self.origin, self.squares, e, _DISTANCE_BITS, threads)

    def move(self, before: np.ndarray, after: np.ndarray, sums: np.ndarray) -> None:
        solver().move_rows(self.array, before, after, sums, torch.get_num_threads())


def _rows(W: Tensor) -> _Rows:
    native = solver() and W.device.type == "cpu" and W.dtype in _NativeRows.DTYPES and type(W.detach()) is Tensor
    return (_NativeRows if native else _Rows)(W)


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
        W: ``[d, d_in]``, any floating-point dtype, device and strides; finite. It is read as it is, without a float64
            copy; only if single rows are strided (a transposed weight) is it copied, in its own dtype.
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
    check_matrix(op, "W", W)
    check_sizes(op, "W", W.shape[0], num_clusters, "min_size", min_size)
    check_int(op, "n_init", n_init, 1)
    check_int(op, "max_iter", max_iter, 1)
    if not tol >= 0:
        raise ValueError(f"{op}: tol must be >= 0, got {tol}")
    if init is not None:
        check_matrix(op, "init", init)
        init = init.detach().to("cpu", torch.float64)
        if init.shape != (num_clusters, W.shape[1]) or not init.isfinite().all():
            expected = [num_clusters, W.shape[1]]
            raise ValueError(f"{op}: init must be finite and {expected}, got NaN, inf or {list(init.shape)}")
        if n_init != 1:
            raise ValueError(f"{op}: n_init must be 1 when init is given, got {n_init}")
    rows = _rows(W)
    if not math.isfinite(rows.total):
        raise ValueError(f"{op}: W must be finite, got NaN, inf or values whose squares overflow float64")
    generator = torch.Generator("cpu").manual_seed(seed)
    results = []
    for _ in range(n_init):
        e = _kmeans_plus_plus(rows, num_clusters, generator) if init is None else init.numpy() - rows.origin
        results.append(_descend(rows, e, min_size, max_iter, tol))
    return min(results, key=lambda result: result.inertia)


def _kmeans_plus_plus(rows: _Rows, k: int, generator: torch.Generator) -> np.ndarray:
    """Arthur & Vassilvitskii 2007: the next centroid is a row drawn by its squared distance from the nearest so far."""
    chosen = [int(torch.randint(rows.d, (), generator=generator, device="cpu"))]
    nearest = np.full(rows.d, math.inf)
    while len(chosen) < k:
        nearest = np.minimum(nearest, rows.distances(rows.point(chosen[-1])[None])[:, 0])
        cumulative = nearest.cumsum()
        u = float(torch.rand((), dtype=torch.float64, generator=generator, device="cpu"))
        if cumulative[-1] > 0:
            row = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
        else:  # every row is a copy of one already chosen: any will do
            row = int(u * rows.d)
        chosen.append(min(row, rows.d - 1))
    return np.stack([rows.point(row) for row in chosen])


def _cost(stage: int, D: np.ndarray, now: _Partition) -> np.ndarray:
    """What a stage assigns by."""
    if stage == 0:
        return np.sqrt(D)
    if stage == 2:
        return D
    change = D * (now.size / (now.size + 1))
    own, size = (np.arange(len(D)), now.labels), now.size[now.labels]
    change[own] = D[own] * size / np.maximum(size - 1, 1)
    return D + 0.75 * (change - D)  # not all of the change: rows that move together would overshoot


def _descend(rows: _Rows, e: np.ndarray, min_size: int, max_iter: int, tol: float) -> KMeansResult:
    """From the centroids ``origin + e``. An iteration costs one pass over W and one over the rows that moved."""
    k = len(e)
    now = rows.partition(assign_numpy(np.sqrt(rows.distances(e)), min_size), k, None)
    D = rows.distances(now.e)
    centre = (now.size[:, None] * now.e).sum(0) / rows.d
    tol *= (rows.total / rows.d - float((centre * centre).sum())) / rows.d_in  # times the mean variance of a feature
    stage, converged = 0, False
    for n_iter in range(1, max_iter + 1):
        for step in range(stage, len(_STAGES)):
            labels = assign_numpy(_cost(step, D, now), min_size)
            after = rows.partition(labels, k, now if n_iter % _RESUM_EVERY else None)
            gain = now.inertia - after.inertia
            if gain > _NO_GAIN * rows.total:
                break
        else:
            converged = True
            break
        stage += gain < _STAGES[stage] * rows.total
        shift = float(np.square(after.e - now.e).sum())
        now, D = after, rows.distances(after.e)
        if shift <= tol:
            converged = True
            break
    own = D[np.arange(rows.d), now.labels]
    return KMeansResult(
        labels=rows.on_device(now.labels),
        centroids=rows.on_device(now.e + rows.origin),
        distances=rows.on_device(own),
        inertia=math.fsum(own.tolist()),
        n_iter=n_iter,
        converged=converged,
    )


def select_rows(W: Tensor, num_clusters: int, r: int, *, selection: str = "nearest", seed: int = 0) -> Tensor:
    """``index [k, r]``, all entries distinct: the rows of ``W`` that become the frozen ``A_i = W[index_i, :]``.

    * ``nearest`` (the method): :func:`constrained_kmeans` with ``min_size = r``, then from every cluster the ``r`` rows
      nearest to its centroid, nearest first (ties: the lower row first);
    * ``sequential`` (the paper's ablation SS): rows ``0 .. k*r - 1``, in order;
    * ``random`` (the paper's ablation RS): ``k*r`` distinct rows drawn uniformly by ``seed``;
    * ``pivoted_qr``: the same clusters, and of each the ``r`` rows that :func:`~idlora_ext.pivoting.pivoted_rows` picks
      first: an interpolative decomposition of each ``W_i``, rows that span their cluster rather than its middle;
    * ``pivoted_qr_whole``: the first ``k*r`` pivots of the whole of ``W``, without clusters. Pivot ``p`` goes to
      ``index[p mod k, p // k]``, as cards are dealt: every ``A_i`` then spans ``W`` coarsely by itself, and the ``k``
      rows that ``z_j`` adds up and one column of ``B`` serves are neighbours in the order of their residuals. (The
      first ``r`` pivots to the first ``i`` and so on would leave the last ``A_i`` with the leavings.)

    Args:
        W: ``[d, d_in]``, any floating-point dtype, device and strides; finite unless ``selection`` is ``sequential`` or
            ``random``, which do not read it.
        num_clusters: ``k``, at least 1.
        r: the rank: rows per cluster, at least 1, at most ``d / k``.
        seed: of all draws, which are made on the CPU whatever the device of ``W``.

    Returns:
        ``index [k, r]`` int32 on the device of ``W``, contiguous.

    Raises:
        TypeError: ``W`` is no floating-point tensor, or a size no integer.
        ValueError: a shape, size or value outside of the above, or ``W`` on the meta device.

    Source: "ID-LoRA", arXiv 2602.20727, section 4.1 and its ablations of the selection.
    """
    check_matrix("select_rows", "W", W)
    check_sizes("select_rows", "W", W.shape[0], num_clusters, "r", r)
    if selection not in SELECTIONS:
        raise ValueError(f"select_rows: selection must be one of {', '.join(SELECTIONS)}, got {selection!r}")
    k = num_clusters
    if selection == "nearest":
        result = constrained_kmeans(W, k, r, seed=seed)
        order = result.distances.argsort(stable=True)
        clusters = result.labels[order]
        index = torch.stack([order[clusters == c][:r] for c in range(k)])
    elif selection == "pivoted_qr":
        labels = constrained_kmeans(W, k, r, seed=seed).labels
        members = [(labels == c).nonzero()[:, 0] for c in range(k)]
        index = torch.stack([rows[pivoted_rows(W[rows], r, seed=seed).to(rows.device)] for rows in members])
    elif selection == "pivoted_qr_whole":
        index = pivoted_rows(W, k * r, seed=seed).view(r, k).T
    elif selection == "sequential":
        index = torch.arange(k * r, device="cpu").view(k, r)
    else:
        generator = torch.Generator("cpu").manual_seed(seed)
        index = torch.randperm(len(W), generator=generator, device="cpu")[: k * r].view(k, r)
    return index.to(W.device, torch.int32).contiguous()  # or every call of an operator would copy it
