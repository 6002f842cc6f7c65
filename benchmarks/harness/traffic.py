"""Bytes that eager PyTorch moves, counted op by op on meta tensors: nothing is computed.

Counted is every op that is really dispatched: the bytes of the tensors it reads and writes, each once, as if caches
were perfect within an op and empty between two. Views and mere allocations move nothing; a gather reads, and a scatter
reads and writes, the elements it touches; an expanded tensor counts once. So the figures are modelled, and in eager's
favour.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from idlora_ext import reference
from idlora_ext.ops import default_kernels as kernels

_aten = torch.ops.aten
ALLOCATIONS = {_aten.empty, _aten.new_empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty_strided}
WRITE_ONLY = {_aten.copy_, _aten.zero_, _aten.fill_}  # of ops in place: what they write they do not read
GATHERS = {_aten.index_select, _aten.index, _aten.gather}
SCATTERS = {_aten.scatter_add_: 2, _aten.index_copy_: 1}  # how often each touched element of the target moves


class Traffic(TorchDispatchMode):
    """``with Traffic() as traffic: ...``; then ``traffic.bytes``."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.bytes += _moved(func, args, kwargs or {}, _tensors(result))
        return result


def default_kernels(N: int, d: int, k: int, r: int, s: int, dtype: torch.dtype) -> dict[str, int]:
    """The package's kernels for any device: the maths rearranged for plain PyTorch, one product with B in all."""
    y0, index, router, B = _adapter(N, d, k, r, s, dtype)
    x = y0.new_empty(N, k, r)
    return {
        "forward": _count(lambda: kernels._adapt(y0, index, router, B, None, 1.0, save_x=True)),
        "backward": _count(lambda: kernels._adapt_backward(y0, x, index, router, B, 1.0)),
    }


def as_written(N: int, d: int, k: int, r: int, s: int, dtype: torch.dtype) -> dict[str, int]:
    """The paper's equations as eager PyTorch, a product with B for each cluster, differentiated by autograd."""
    y0, index, router, B = _adapter(N, d, k, r, s, dtype)
    return _both(lambda y0, router, B: reference.adapt(y0, index, router, B), [y0, router, B])


def lora(N: int, d: int, dtype: torch.dtype, r: int = 32) -> dict[str, int]:
    """What PEFT's LoRA adds to a frozen square layer: its module minus the layer, adapters in the layer's dtype."""
    frozen = nn.Linear(d, d, bias=False, device="meta", dtype=dtype).requires_grad_(False)
    layer = inject_adapter_in_model(LoraConfig(r=r, target_modules=["0"]), nn.Sequential(frozen)).to(dtype)
    h = torch.empty(N, d, device="meta", dtype=dtype)
    adapted = _both(lambda h, *_: layer(h), [h, *(p for p in layer.parameters() if p.requires_grad)])
    alone = _both(frozen, [h])
    return {phase: adapted[phase] - alone[phase] for phase in adapted}


def _adapter(N: int, d: int, k: int, r: int, s: int, dtype: torch.dtype) -> list[Tensor]:
    """y0, index, router and B on the meta device."""
    shapes = [((N, d), dtype), ((k, r), torch.int32), ((1, r), dtype), ((d // s, r // s), dtype)]
    return [torch.empty(shape, device="meta", dtype=kind) for shape, kind in shapes]


def _both(function: Callable[..., Tensor], variables: list[Tensor]) -> dict[str, int]:
    variables = [t if t.requires_grad else t.detach().requires_grad_() for t in variables]
    with Traffic() as forward:
        y = function(*variables)
    dy = torch.empty_like(y)
    with Traffic() as backward:
        torch.autograd.grad(y, variables, dy)
    return {"forward": forward.bytes, "backward": backward.bytes}


def _count(run: Callable[[], object]) -> int:
    with Traffic() as traffic:
        run()
    return traffic.bytes


def _moved(func: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> int:
    op, inputs = func.overloadpacket, _tensors((args, kwargs))
    if op in ALLOCATIONS or func.is_view or func.namespace == "prim":  # fake tensors ask prim for their device
        return 0
    if op in GATHERS:
        return 2 * _bytes(outputs) + _bytes(inputs[1:])
    if op in SCATTERS:
        source = max(inputs[1:], key=lambda t: t.numel() * t.is_floating_point())
        return SCATTERS[op] * source.numel() * source.itemsize + _bytes(inputs[1:])
    if "out" in kwargs:
        return _bytes(inputs)  # it is among them: written, not read
    if func._schema.is_mutable:
        return _bytes(inputs[1:]) + (1 if op in WRITE_ONLY else 2) * _bytes(inputs[:1])
    ours = {_storage(t) for t in inputs}
    if outputs and all(_storage(t) in ours for t in outputs):
        return 0  # a view
    return _bytes(inputs) + _bytes(outputs)


def _tensors(tree: Any) -> list[Tensor]:
    """Each once, though an op may be given it twice."""
    return list({id(t): t for t in tree_leaves(tree) if isinstance(t, Tensor)}.values())


def _bytes(tensors: list[Tensor]) -> int:
    return sum(
        t.itemsize * torch.Size(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride).numel()
        for t in tensors
    )


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata
