"""The mean of a base output over tokens, which centred adapters take out of their products."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

if dist.is_available():
    from torch.distributed.tensor import DTensor
else:  # a build of torch without it: then nothing is ever sharded
    DTensor = type("DTensor", (), {})  # type: ignore[assignment, misc]
from ..base.sharding import world_size
from ..ops.column_parallel import Columns
from ..ops.fakes import accumulate


def token_sums(y0: Tensor, columns: Columns | None, d: int, mask: Tensor | None = None) -> Tensor:
    """``sum_n y0_n`` and the number of tokens, ``[2, d]``; zeros in columns that this rank does not have.

    Of an output ``[batch, length, d]`` tokens that ``mask [batch, length]`` masks do not count.
    """
    first, last = (0, d) if columns is None else (columns.first, columns.last)
    sums = torch.zeros(2, d, dtype=accumulate(y0.dtype), device=y0.device)
    count: Tensor | int = y0.numel() // y0.shape[-1]
    if mask is not None and mask.shape == y0.shape[:-1]:
        kept = mask.to(y0.device).bool()
        y0, count = torch.where(kept.unsqueeze(-1), y0, 0), kept.sum()  # what pads may be NaN
    sums[0, first:last] = y0.flatten(0, -2).sum(0, dtype=sums.dtype)
    sums[1, first:last] = count
    return sums


def mean_over_tokens(y0: Tensor, columns: Columns | None, d: int, mask: Tensor | None = None) -> Tensor:
    """``1/N sum_n y0_n [d]`` over the tokens of all ranks that are not masked; each rank must call this."""
    sums = token_sums(y0, columns, d, mask)
    if world_size() > 1:
        dist.all_reduce(sums)
    return sums[0] / sums[1].clamp_min(1)
