"""The way through an adapted layer on a CPU without gradients, which decoding takes once a token.

One token is little work, and by the next one all that a layer looks up has left the caches: lookups in Python then cost
more than the operator. So this is ``Linear.forward`` once more for the usual case, past the modules in which parameters
and buffers lie. Whatever is unusual (several adapters, opaque bases, profilers, compilers) is left to ``forward``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ..base.weight import is_plain
from ..ops import nvtx

if TYPE_CHECKING:
    from .layer import Linear


def infer(layer: Linear, h: Tensor) -> Tensor | None:
    """``y = h W^T + b + scaling * concat_j(B z^(j))``, bit for bit, written into what the base layer returns.

    None, before anything is computed, where ``forward`` has to do it.
    """
    if not nvtx.eager_without_ranges():
        return None
    indices, routers, Bs, means, scales = layer.tensors_held or _hold(layer)
    active: Any = layer._active_adapter
    base: Any = layer._modules["base_layer"]
    adapter = active if isinstance(active, str) else active[0] if len(active) == 1 else ""
    B = Bs.get(adapter)
    if (
        B is None
        or layer.mixed_batch is not None
        or layer._disable_adapters
        or layer.merged_adapters
        or layer.pending
        or (layer.training and layer.dropout[adapter])
        or not is_plain(base)  # which may keep what it returns
    ):
        return None
    y0, offset, offset_in_y0 = layer.product(base, h)
    index, router, mean, scale = indices[adapter], routers[adapter], means.get(adapter), scales.get(adapter)
    dtype = y0.dtype
    taken = dtype, torch.float32  # beside y0
    if (
        type(y0) is not Tensor
        or y0.shape[-1] != layer.out_features
        or dtype is torch.float64
        or router.dtype not in taken
        or (mean is not None and mean.dtype not in taken)
        or (scale is not None and scale.dtype is not torch.float32)
    ):
        return layer.adapt([adapter], y0, offset, offset_in_y0)
    if mean is not None:
        offset, offset_in_y0 = mean, True
    scaling, bounded = layer.scaling[adapter], layer.bounded[adapter]
    return ops.adapt_(y0, index, router, B, offset, scaling, offset_in_y0, scale, bounded)


def _hold(layer: Linear) -> tuple[dict[str, Any], ...]:
    """Keep the dictionaries in which the layer's tensors lie: they live as long as it does, and are read anew."""
    held: Any = layer._modules
    buffers = [held[f"idlora_{name}"]._buffers for name in ("index", "mean", "row_scale")]
    parameters = [held[f"idlora_{name}"]._parameters for name in ("router", "B")]
    layer.tensors_held = buffers[0], *parameters, *buffers[1:]
    return layer.tensors_held
