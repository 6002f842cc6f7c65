"""``select_rows``: the rows of ``W`` that become the frozen ``A_i = W[index_i]``, by each of the ways there are."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from .assignment import check_matrix, check_sizes
from .kmeans import constrained_kmeans
from .pivoting import pivoted_rows

Selection = Literal["pivoted_qr_whole", "pivoted_qr", "nearest", "sequential", "random"]

SELECTIONS: tuple[Selection, ...] = get_args(Selection)

CLUSTERED: tuple[Selection, ...] = ("pivoted_qr", "nearest")  # each A_i is of rows of one cluster


def select_rows(W: Tensor, num_clusters: int, r: int, *, selection: str = "nearest", seed: int = 0) -> Tensor:
    """``index [k, r]``, all entries distinct: the rows of ``W`` that become the frozen ``A_i = W[index_i, :]``.

    * ``nearest`` (the method): :func:`constrained_kmeans` with ``min_size = r``, then from every cluster the ``r`` rows
      nearest to its centroid, nearest first (ties: the lower row first);
    * ``sequential`` (the paper's ablation SS): rows ``0 .. k*r - 1``, in order;
    * ``random`` (the paper's ablation RS): ``k*r`` distinct rows drawn uniformly by ``seed``;
    * ``pivoted_qr``: the same clusters, and of each the ``r`` rows that
      :func:`~idlora_ext.rows.pivoting.pivoted_rows` picks first: an interpolative decomposition of each ``W_i``, rows
      that span their cluster rather than its middle;
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
