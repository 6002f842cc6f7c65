"""The weights of a base layer, however it keeps them: the adapter needs them once, to choose rows, and never again.

================================  ==================  ======================================================
layer                             keeps               ``W`` is read
================================  ==================  ======================================================
``nn.Linear``, ``Conv1D``         ``weight``          as it is
bitsandbytes 8- and 4-bit         ``weight``, packed  by PEFT's quantisation backend
torchao                           a tensor subclass   by PEFT's quantisation backend
HQQ                               ``W_q``             by PEFT's quantisation backend
GPTQ, AWQ (``QuantLinear``)       ``qweight``         through the layer: ``base(I) - b = W^T``
AQLM                              ``codes``           through the layer
``nn.Linear`` of a packed dtype   ``weight``          through the layer (FP8, BitNet, ...)
================================  ==================  ======================================================

GGUF files are dequantised by transformers when they are loaded: their layers are plain ``nn.Linear``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import quantised
from .experts import ExpertLinear
from .peft_internals import ForwardOnlyQuantizationBackend, QuantizationBackend

_CHUNK = 256  # columns of W read through a layer at a time


def is_linear(layer: nn.Module) -> bool:
    """Whether ``layer`` is known to return ``h W^T + b``: a linear layer, or a quantised one of the table above."""
    if isinstance(layer, (nn.Linear, Conv1D)):
        return True
    sizes = (getattr(layer, name, None) for name in ("in_features", "out_features"))
    return all(isinstance(size, int) for size in sizes) and any(
        isinstance(getattr(layer, name, None), Tensor) for name in ("qweight", "W_q", "codes")
    )


def is_plain(layer: nn.Module) -> bool:
    """Whether calling ``layer`` is ``h W^T + b`` and nothing else: the very class, unhooked, unparametrised."""
    return (
        type(layer) in (nn.Linear, Conv1D, ExpertLinear)
        and "forward" not in vars(layer)
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)
    )


def linear_shape(layer: Any) -> tuple[int, int]:
    """``(d_in, d)`` of a supported layer."""
    return (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)


def stored(layer: nn.Module) -> Tensor:
    """The tensor in which a layer keeps ``W``, for its device and dtype; packed, its shape means nothing."""
    tensors = (getattr(layer, name, None) for name in ("qweight", "W_q", "codes", "weight"))
    return next(tensor for tensor in tensors if isinstance(tensor, Tensor))


def parameter_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype for an adapter's parameters: that of the weights, float32 if they are packed."""
    dtype = stored(layer).dtype
    return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.float32


def is_quantised(layer: nn.Module, backend: QuantizationBackend | None) -> bool:
    """Whether the layer keeps less than 16 bits a weight, whatever dtype it shows."""
    dtype = stored(layer).dtype
    return backend is not None or not dtype.is_floating_point or dtype.itemsize == 1


@torch.no_grad()
def base_weight(layer: nn.Module, backend: QuantizationBackend | None) -> Tensor:
    """``W [d, d_in]``; a fresh dequantised tensor if the layer is quantised, for the caller to free."""
    d_in, d = linear_shape(layer)
    weight = stored(layer)
    if weight.is_meta:
        return torch.empty(d, d_in, device="meta", dtype=parameter_dtype(layer))
    if not is_quantised(layer, backend):
        return weight.detach().t() if isinstance(layer, Conv1D) else weight.detach()
    readable = backend is not None and not isinstance(backend, ForwardOnlyQuantizationBackend)
    if readable and not quantised.packed_for_inference(layer):
        try:
            return backend.get_base_weight(layer)  # type: ignore[union-attr]
        except NotImplementedError:  # a kind of torchao tensor that cannot be dequantised
            pass
    return read_through(layer)


@torch.no_grad()
def read_through(layer: Any) -> Tensor:
    """``W [d, d_in]``, float32, from ``layer(I) - b = W^T``: right for any layer that returns ``h W^T + b``."""
    d_in, d = linear_shape(layer)
    tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    dtype = next((t.dtype for t in tensors if t.is_floating_point() and t.dtype.itemsize > 1), torch.float32)
    device = stored(layer).device
    W = torch.empty(d, d_in, device=device)
    for start in range(0, d_in, _CHUNK):
        unit = torch.zeros(min(_CHUNK, d_in - start), d_in, dtype=dtype, device=device)
        unit.diagonal(start).fill_(1)
        columns = layer(unit).float()
        if layer.bias is not None:
            columns -= layer.bias.float()
        W[:, start : start + len(unit)] = columns.T
    return W
