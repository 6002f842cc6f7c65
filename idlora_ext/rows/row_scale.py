"""``row_scale``: a fixed factor for each chosen row, with which all chosen rows have one norm."""

from __future__ import annotations

import torch
from torch import Tensor


def row_scale(weight: Tensor, index: Tensor) -> Tensor:
    """``c_ij = m / ||W[index_ij]||``, ``m`` the median norm of the rows of ``W`` that are not zero.

    ``x_ij = c_ij y0[index_ij]`` is then what a row of norm ``m`` gives: rows count by their direction, and outlier rows
    no longer decide ``a_i``, the first gradients or which entries of ``B`` learn fastest. The median keeps the size of
    the update: a typical row has ``c = 1``, so that learning rates carry over, and ``x`` still scales with ``W``. The
    bare ``1 / norm`` would make the size of the update that of ``h`` alone, by another factor in every layer, and the
    root mean square is itself decided by outliers.

    A row whose norm is within rounding of zero (at most 1e-6 of the median) has ``c = 0``: its direction is rounding
    error, which ``1 / norm`` would make as large as everything else.

    Args:
        weight: ``W [d, d_in]``; on the meta device the scale is 1, to be filled from a file.
        index: ``[k, r]``.

    Returns:
        ``[k, r]`` float32.
    """
    if weight.is_meta:
        return torch.ones(index.shape, device=index.device)
    # Blocks, as the float64 copy that this makes of each would be twice as large as W.
    norms = torch.cat([torch.linalg.vector_norm(b, dim=1, dtype=torch.float64) for b in weight.split(1024)])
    nonzero = norms[norms > 0]
    if not len(nonzero):
        return torch.zeros(index.shape, device=index.device)
    median = nonzero.median()
    chosen = norms[index.long()]
    floor = 1e-6 * median
    return torch.where(chosen > floor, median / chosen.clamp_min(floor), 0).float().to(index.device)
