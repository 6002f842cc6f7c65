"""``center``: the products with the chosen rows, less what they are on average over tokens.

``x_i = (y0 - m)[index_i]``, ``m [d]`` the mean of the base output ``y0`` over the tokens of a first batch or of a
calibration. The hidden states of language models have a large part that all tokens share, and in some layers nearly all
of ``x`` is the product with it: there the update is first of all a constant added to ``y``, and a rate small enough for
that one direction is too small for those that tell tokens apart. Centred products have only these. ``m`` is fixed, so
nothing is added to what is trained, and gathering already subtracts a vector where a layer's bias is in ``y0``: it
costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from ..base import sharding
from ..base.experts import ExpertLinear
from ..ops.column_parallel import Columns
from ..ops.fakes import accumulate
from ..ops.functional import transformed
from .adapter import Adapter, BaseOutput
from .layer import IdLoraLayer


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
    if sharding.world_size() > 1:
        dist.all_reduce(sums)
    return sums[0] / sums[1].clamp_min(1)


def take_means(layer: IdLoraLayer, adapters: Iterable[Adapter], base: BaseOutput) -> None:
    """Take ``m`` from the first batch of training, while ``B`` is zero: what the layer returns does not change."""
    for adapter in adapters:
        if not adapter.mean_taken and adapter.B.requires_grad and base.y0.numel():
            _take_mean(layer, adapter, base)
            layer.padding_mask = None


@torch.no_grad()
def _take_mean(layer: IdLoraLayer, adapter: Adapter, base: BaseOutput) -> None:
    mean, B = adapter.mean, adapter.B
    assert mean is not None
    replica = getattr(adapter, "_is_replica", False)
    if transformed() or replica:
        if mean.any():  # it is from a file
            return
        why = (
            "a replica of nn.DataParallel would lose it again"
            if replica
            else ("a transform (torch.func, forward-mode) may not change a buffer")
        )
        _refuse(layer, adapter, why)
    taken = mean.any() | B.any()  # it is from a file, however that was loaded
    if sharding.world_size() == 1 or not (layer.on_this_rank_only or isinstance(layer.base_layer, ExpertLinear)):
        # No branch on what a tensor holds: it would wait for the device, and keep a compiler from one graph.
        of_batch = mean_over_tokens(base.y0, base.columns, layer.out_features, layer.padding_mask)
        mean.copy_(torch.where(taken, mean, of_batch))
    elif not taken:
        _refuse(layer, adapter, "not all ranks call this layer, and they would wait for one another")
    adapter.mean_taken = True


def _refuse(layer: IdLoraLayer, adapter: Adapter, why: str) -> NoReturn:
    raise ValueError(
        f"layer {layer.name!r}: adapter {adapter.name!r} is to be centred by the mean over the first batch, but {why}. "
        "Call idlora_ext.calibrate(model, batches) before training (on every rank), or use center=False."
    )
