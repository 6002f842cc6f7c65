"""Rows of a frozen weight as points: k-means with a minimum cluster size.

:func:`constrained_kmeans` is the descent. ``assignment.py`` has its assignment step, ``passes.py`` what it reads of
``W``, ``selection.py`` which rows are then chosen.

On the CPU the native module, where there is one, makes the passes over ``W`` and the assignments; Python does the same
everywhere else. All that is small is on the host, in numpy: threads would cost more than they do.

The rows depend neither on the native module nor on the number of threads. Both may change the last bits of a float64
sum, so squared distances are rounded to a grid far above those bits, and far below anything that matters, before a
decision is taken. Ties go to the lower cluster, then to the lower row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .assignment import assign_numpy, check_int, check_matrix, check_sizes
from .passes import Partition, Rows, rows_of

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

    A local minimum. Every iteration is an :func:`~idlora_ext.rows.assignment.assign`, after which each centroid is the
    mean of its rows, and lowers the inertia. What is assigned by goes from coarse to fine, each for as long as that
    gains enough:

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
    rows = rows_of(W)
    if not math.isfinite(rows.total):
        raise ValueError(f"{op}: W must be finite, got NaN, inf or values whose squares overflow float64")
    generator = torch.Generator("cpu").manual_seed(seed)
    results = []
    for _ in range(n_init):
        e = _kmeans_plus_plus(rows, num_clusters, generator) if init is None else init.numpy() - rows.origin
        results.append(_descend(rows, e, min_size, max_iter, tol))
    return min(results, key=lambda result: result.inertia)


def _kmeans_plus_plus(rows: Rows, k: int, generator: torch.Generator) -> np.ndarray:
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


def _cost(stage: int, D: np.ndarray, now: Partition) -> np.ndarray:
    """What a stage assigns by."""
    if stage == 0:
        return np.sqrt(D)
    if stage == 2:
        return D
    change = D * (now.size / (now.size + 1))
    own, size = (np.arange(len(D)), now.labels), now.size[now.labels]
    change[own] = D[own] * size / np.maximum(size - 1, 1)
    return D + 0.75 * (change - D)  # not all of the change: rows that move together would overshoot


def _descend(rows: Rows, e: np.ndarray, min_size: int, max_iter: int, tol: float) -> KMeansResult:
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
