"""The paper's equations, literally: explicit ``A_i = W[index_i]``, a loop over clusters, a ``concat``.

The oracle of the tests, in whatever dtype it is given (the tests give float64). The product never imports it.
Source: arXiv 2602.20727, eq. 3 and 4.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear(
    h: Tensor,
    W: Tensor,
    b: Tensor | None,
    index: Tensor,
    router: Tensor,
    B: Tensor,
    scaling: float = 1.0,
    *,
    row_scale: Tensor | None = None,
    mean: Tensor | None = None,
    bounded: bool = False,
    center: Tensor | None = None,
) -> Tensor:
    """``y = h W^T + b + scaling * sum_i a_i concat_j(B (A_i h)^(j))``, ``a_i = <T_i, A_i h>``.

    Args:
        h: ``[..., d_in]``; W: ``[d, d_in]``; b: ``[d]`` or None; index: ``[k, r]``; router: ``[k, r]`` or ``[1, r]``,
        or ``a_i`` itself (a static router), ``[k]`` or ``[1]``; B: ``[d/s, r/s]``; row_scale: ``c [k, r]``, then
        ``A_i = diag(c_i) W[index_i]``; mean: ``m [d]``, then ``A_i h`` becomes ``diag(c_i) (W h + b - m)[index_i]``;
        bounded: ``1 + tanh(4 <T, u / rms(u)>)``, ``u = sum_i x_i``, instead of ``<T_i, x_i>``; center: ``ubar`` and
        ``w``, then ``A_i h`` becomes ``P A_i h`` (not with a linear router).

    Returns:
        ``[..., d]``.
    """
    y = h @ W.T if b is None else h @ W.T + b
    x = []
    for i, rows in enumerate(index.long()):
        c_i = torch.eye(len(rows), dtype=W.dtype) if row_scale is None else torch.diag(row_scale[i].to(W.dtype))
        x_i = h @ (c_i @ W[rows]).T
        if mean is not None:
            x_i = x_i + ((0 if b is None else b[rows]) - mean[rows].to(W.dtype)) @ c_i
        x.append(x_i)
    return y + scaling * update(centred(x, center), router, B, bounded)


def adapt(
    y0: Tensor,
    index: Tensor,
    router: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    scaling: float = 1.0,
    bias_in_y0: bool = False,
    row_scale: Tensor | None = None,
    bounded: bool = False,
    center: Tensor | None = None,
) -> Tensor:
    """The same as a function of the base output: ``x_i = c_i (y0 - b)[index_i]``, for tests of the op without ``W``."""
    without_bias = y0 - bias if bias is not None and bias_in_y0 else y0
    y = y0 + bias if bias is not None and not bias_in_y0 else y0
    c = torch.ones_like(index) if row_scale is None else row_scale
    x = [without_bias[..., columns] * c_i.to(y0.dtype) for c_i, columns in zip(c, index.long(), strict=True)]
    return y + scaling * update(centred(x, center), router, B, bounded)


def centred(x: list[Tensor], center: Tensor | None) -> list[Tensor]:
    """``P x_i = x_i - ubar <w, x_i>``: ``P`` is linear, so their weighted sum is ``P`` of that of ``x_i``."""
    if center is None:
        return x
    ubar, w = center.to(x[0].dtype)
    return [x_i - ubar * (x_i * w).sum(-1, keepdim=True) for x_i in x]


def alpha(x: list[Tensor], i: int, router: Tensor, bounded: bool = False) -> Tensor:
    """``a_i = <T_i, x_i>``, ``1 + tanh(4 <T, u / rms(u)>)`` with ``u = sum_i x_i``, or the constant that is given."""
    T_i = router[min(i, router.shape[0] - 1)]
    if not T_i.ndim:
        return T_i
    if bounded:
        u = torch.stack(x).sum(0)
        return 1 + (4 * (u * T_i).sum(-1, keepdim=True) / u.square().mean(-1, keepdim=True).sqrt()).tanh()
    return (x[i] * T_i).sum(-1, keepdim=True)


def row_scale(W: Tensor, index: Tensor) -> Tensor:
    """``c_ij``: the median norm of the rows that are not zero over ``||W[index_ij]||``, and 0 for a row of zeros."""
    norms = [float(row.norm()) for row in W]
    median = sorted(n for n in norms if n)[(sum(n > 0 for n in norms) - 1) // 2]
    return torch.tensor([[median / norms[row] if norms[row] else 0.0 for row in rows] for rows in index.tolist()])


def pivoted_rows(W: Tensor, count: int) -> list[int]:
    """Each time the row that is farthest from the span of those before it; ``count`` is at most the rank of ``W``."""
    chosen: list[int] = []
    while len(chosen) < count:
        A = W[chosen]
        left = (W - W @ torch.linalg.pinv(A) @ A).norm(dim=1) if chosen else W.norm(dim=1)
        chosen.append(int(left.argmax()))
    return chosen


def update(x: list[Tensor], router: Tensor, B: Tensor, bounded: bool) -> Tensor:
    """``sum_i a_i concat_j(B x_i^(j))``."""
    update = torch.zeros(())
    for i, x_i in enumerate(x):
        boosted = torch.cat([part @ B.T for part in x_i.split(B.shape[1], dim=-1)], dim=-1)
        update = update + alpha(x, i, router, bounded) * boosted
    return update
