"""Pivoted QR of rows: which rows of a matrix span the others best, from a random sketch of it.

An interpolative decomposition ``W ~ P W[pivots]`` needs only the pivots here: they are the rows that ``W`` already has.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_OVERSAMPLING = 32

_BLOCK = 1 << 24  # elements of W turned into float64 at a time

_SPANNED = 1e-12  # of a row's squared norm: what is left of it is rounding, of W in float32 or of this computation

_TIE_BITS = 30  # residuals that agree to so many bits are equal, so that threads and devices agree on the pivots


def pivoted_rows(W: Tensor, count: int, *, seed: int = 0) -> Tensor:
    """The first ``count`` pivots of a column-pivoted QR of ``W^T``, in order: each time the row that is farthest from
    the span of those before it, ``p_j = argmax_i ||W_i - proj(W_i; W[p_1 .. p_{j-1}])||``.

    It works on ``S = W G [d, count + 32]`` with ``G`` standard normal (Voronin & Martinsson 2017, "Efficient algorithms
    for CUR and interpolative matrix decompositions", section 4.3): distances in ``S`` are those in ``W`` up to a few
    percent, and the pivots span ``W`` as well as those of ``W`` itself to about that. If ``d_in <= count + 32``, ``W``
    itself is taken, and the pivots are exactly those of LAPACK's ``geqp3``. Once the pivots span all rows (``count``
    exceeds the rank) it starts again among the rest. Ties go to the lower row.

    Args:
        W: ``[d, d_in]``, any floating-point dtype, device and strides; finite.
        count: at most ``d``.
        seed: of ``G``, which is drawn on the CPU whatever the device of ``W``.

    Returns:
        ``[count]`` int64 on the CPU, distinct.

    Raises:
        ValueError: ``W`` has a NaN, an infinity, or values whose squares overflow float64.
    """
    S = _sketch(W.detach(), count + _OVERSAMPLING, seed)
    with np.errstate(over="ignore"):
        finite = np.isfinite((S * S).sum())
    if not finite:
        raise ValueError("pivoted_rows: W must be finite, got NaN, inf or values whose squares overflow float64")
    chosen: list[int] = []
    free = np.arange(len(S))
    while len(chosen) < count:
        pivots = _pivots(S[free], count - len(chosen))
        if not pivots:  # rows of zeros are left
            pivots = list(range(count - len(chosen)))
        chosen += free[pivots].tolist()
        free = np.delete(free, pivots)
    return torch.tensor(chosen, device="cpu")


def _sketch(W: Tensor, columns: int, seed: int) -> np.ndarray:
    d_in = W.shape[1]
    G = None
    if columns < d_in:
        generator = torch.Generator("cpu").manual_seed(seed)
        G = torch.randn(d_in, columns, generator=generator, dtype=torch.float64, device="cpu").to(W.device)
    blocks = [block.double() for block in W.split(max(1, _BLOCK // d_in))]
    return torch.cat([block if G is None else block @ G for block in blocks]).cpu().numpy()


def _pivots(S: np.ndarray, count: int) -> list[int]:
    """Pivots until they are ``count`` or span all rows. Squared distances are downdated, as LAPACK's are."""
    squares = (S * S).sum(1)
    left = squares.copy()
    Q = np.empty((min(count, S.shape[1]), S.shape[1]))
    pivots: list[int] = []
    while len(pivots) < len(Q):
        grid = np.ldexp(1.0, np.frexp(left.max())[1] - _TIE_BITS)
        pivot = int(np.argmax(np.round(left / grid)))
        if left[pivot] <= 0:
            break
        before = Q[: len(pivots)]
        q = S[pivot]
        for _ in range(2):  # once more for what rounding left
            q = q - (before @ q) @ before
        q /= np.linalg.norm(q)
        Q[len(pivots)] = q
        pivots.append(pivot)
        left -= (S @ q) ** 2
        left[left <= _SPANNED * squares] = 0
        left[pivots] = 0
    return pivots
