"""The paper's equations, literally: explicit ``A_i = W[index_i]``, a loop over clusters, a ``concat``.

The oracle of the tests, in whatever dtype it is given (the tests give float64). The product never imports it.
Source: arXiv 2602.20727, eq. 3 and 4.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear(
    h: Tensor, W: Tensor, b: Tensor | None, index: Tensor, router: Tensor, B: Tensor, scaling: float = 1.0
) -> Tensor:
    """``y = h W^T + b + scaling * sum_i <T_i, A_i h> concat_j(B (A_i h)^(j))``.

    Args:
        h: ``[..., d_in]``; W: ``[d, d_in]``; b: ``[d]`` or None; index: ``[k, r]``; router: ``[k, r]`` or ``[1, r]``,
        or ``a_i`` itself (a static router), ``[k]`` or ``[1]``; B: ``[d/s, r/s]``.

    Returns:
        ``[..., d]``.
    """
    y = h @ W.T if b is None else h @ W.T + b
    for i, rows in enumerate(index.long()):
        x_i = h @ W[rows].T
        y = y + scaling * _boosted(x_i, router[min(i, router.shape[0] - 1)], B)
    return y


def adapt(
    y0: Tensor,
    index: Tensor,
    router: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    scaling: float = 1.0,
    bias_in_y0: bool = False,
) -> Tensor:
    """The same as a function of the base output: ``x_i = (y0 - b)[index_i]``, for tests of the op without ``W``."""
    without_bias = y0 - bias if bias is not None and bias_in_y0 else y0
    y = y0 + bias if bias is not None and not bias_in_y0 else y0
    for i, columns in enumerate(index.long()):
        y = y + scaling * _boosted(without_bias[..., columns], router[min(i, router.shape[0] - 1)], B)
    return y


def _boosted(x_i: Tensor, T_i: Tensor, B: Tensor) -> Tensor:
    """``a_i concat_j(B x_i^(j))``, ``a_i = <T_i, x_i>``, or the constant that is given as ``T_i``."""
    a_i = (x_i * T_i).sum(-1, keepdim=True) if T_i.ndim else T_i
    return a_i * torch.cat([part @ B.T for part in x_i.split(B.shape[1], dim=-1)], dim=-1)
