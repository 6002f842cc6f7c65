"""The operators' default kernels: plain PyTorch, on any device and for every dtype.

``library.py`` registers them. Native kernels hand over to them what they do not serve. Kernels trust their fake to have
checked the arguments: these call it to allocate their result.

Dtypes: router products, sums and ``z`` are float32 (float64 for float64 activations); products with ``B`` run in the
activation's dtype with float32 accumulation, except for float16, whose range ``z`` (quadratic in the activation) would
leave: there they run in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import bounded_router, fakes
from .fakes import accumulate

default_kernels: dict[str, Callable[..., Any]] = {}  # by the name of the op


def _without_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel`` with autocast off: its dtypes are chosen, not inherited."""

    @functools.wraps(kernel)
    def run(first: Tensor, *args: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return kernel(first, *args)

    return run


def _default(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a kernel the default of ``op``."""

    def note(kernel: Callable[..., Any]) -> Callable[..., Any]:
        default_kernels[op] = _without_autocast(kernel)
        return kernel

    return note


def centred(v: Tensor, center: Tensor | None) -> Tensor:
    """``P v = v - ubar <w, v>``."""
    if center is None:
        return v
    ubar, w = center.to(v.dtype)
    return v - ubar * (w * v).sum(-1, keepdim=True)


def centred_gradient(dv: Tensor, center: Tensor | None) -> Tensor:
    """Of ``P v``, ``P^T dv = dv - w <ubar, dv>``."""
    return dv if center is None else centred(dv, center.flip(0))


def _route(x: Tensor, router: Tensor, bounded: bool, center: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` and ``a [..., k, 1]`` (static: ``[k, 1]`` or ``[1, 1]``), ``z [..., r]`` in the accumulation dtype.

    Of a bounded router ``u [..., 1, r]`` instead of ``x``, and ``a [..., 1, 1]``; of any with one weight if it is
    centred.
    """
    x = x.to(accumulate(x.dtype))
    if center is not None and fakes.keeps_sum(router, bounded):
        x, center = centred(x.sum(-2, keepdim=True), center), None
    if bounded:
        u = x.sum(-2, keepdim=True)
        a = bounded_router.weight(u, router).unsqueeze(-1)
        return u, a, (a * u).squeeze(-2)
    if router.ndim == 1:
        a = router.to(x.dtype).unsqueeze(-1)
        return x, a, centred((a * x).sum(-2), center) if len(a) > 1 else a[0] * x.sum(-2)
    if router.shape[0] == 1:
        a = (x @ router[0].to(x.dtype)).unsqueeze(-1)
    else:
        a = (x * router.to(x.dtype)).sum(-1, keepdim=True)
    return x, a, (a.mT @ x).squeeze(-2)


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype


@_default("cluster_gather")
def _cluster_gather(y0: Tensor, index: Tensor, bias: Tensor | None = None, row_scale: Tensor | None = None) -> Tensor:
    x = fakes.cluster_gather(y0, index, bias, row_scale)
    flat = index.reshape(-1)
    gathered = y0.index_select(-1, flat)
    if bias is not None:
        gathered = gathered - bias.index_select(0, flat)
    if row_scale is not None:
        gathered = gathered * row_scale.reshape(-1)
    return gathered.to(y0.dtype).view(x.shape)


@_default("cluster_gather_backward")
def _cluster_gather_backward(dx: Tensor, index: Tensor, d: int, row_scale: Tensor | None = None) -> Tensor:
    dy0 = fakes.cluster_gather_backward(dx, index, d, row_scale).zero_()
    if row_scale is not None:
        dx = (dx * row_scale).to(dx.dtype)
    return dy0.index_copy_(-1, index.reshape(-1).long(), dx.reshape(*dx.shape[:-2], index.numel()))


@_default("rb_scale")
def _rb_scale(x: Tensor, router: Tensor, bounded: bool = False, center: Tensor | None = None) -> Tensor:
    fakes.rb_scale(x, router, bounded, center)
    return _route(x, router, bounded, center)[2]


def _rb_scale_gradient(
    dz: Tensor, x: Tensor, a: Tensor, router: Tensor, bounded: bool, center: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``dx`` (where it is the same for all clusters, perhaps ``[..., 1, r]``) and ``dT`` in the accumulation dtype.

    ``x`` is what ``_route`` returned: with one weight for all clusters it is centred already.
    """
    dz = dz.unsqueeze(-2)
    if bounded:
        dx, drouter = bounded_router.gradients(dz, x, router)
        return centred_gradient(dx, center), drouter.sum_to_size(router.shape)
    if router.ndim == 1:
        g = centred_gradient(dz, center)
        da = ((dz if fakes.keeps_sum(router, bounded) else g) * x).sum(-1)
        return a * g, da.sum_to_size(router.shape)
    da = (dz * x).sum(-1, keepdim=True)
    dx = torch.addcmul(a * dz, da, router.to(x.dtype))
    return dx, (da * x).sum_to_size(router.shape)


@_default("rb_scale_backward")
def _rb_scale_backward(
    dz: Tensor, x: Tensor, router: Tensor, bounded: bool = False, center: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    fakes.rb_scale_backward(dz, x, router, bounded, center)
    wide, a, _ = _route(x, router, bounded, center)
    dx, drouter = _rb_scale_gradient(dz, wide, a, router, bounded, center)
    return dx.to(x.dtype).expand_as(x).contiguous(), drouter.to(router.dtype)


@_default("shared_gemm")
def _shared_gemm(y0: Tensor, z: Tensor, B: Tensor, bias: Tensor | None = None, scaling: float = 1.0) -> Tensor:
    y = fakes.shared_gemm(y0, z, B, bias, scaling)
    if bias is not None:
        y0 = y0 + bias.to(y0.dtype)
    # The s parts of a row of y0 and of z lie behind one another: seen as [N*s, d/s] and [N*s, r/s], the product with
    # diag(B, .., B) is one plain product with B.
    # Written into y, as what is returned must not be a view: models add to a layer's output in place.
    dtype = _product_dtype(y0.dtype)
    rows, columns = y0.numel() // B.shape[0], B.shape[0]
    parts = y.view(rows, columns)
    factors = (z.reshape(rows, B.shape[1]).to(dtype), B.to(dtype).t())
    if dtype == y.dtype:
        torch.addmm(y0.reshape(rows, columns), *factors, alpha=scaling, out=parts)
    else:
        parts.copy_(torch.addmm(y0.reshape(rows, columns).to(dtype), *factors, alpha=scaling))
    return y


@_without_autocast
def apart_shared_gemm(y0: Tensor, z: Tensor, B: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """The same for transforms, which do not see through ``out=``; a view is what they may return."""
    fakes.shared_gemm(y0, z, B, bias, scaling)
    if bias is not None:
        y0 = y0 + bias.to(y0.dtype)
    dtype = _product_dtype(y0.dtype)
    parts = z.unflatten(-1, (-1, B.shape[1])).to(dtype) @ B.to(dtype).t()
    return torch.add(y0, parts.flatten(-2), alpha=scaling).to(y0.dtype)


@_default("shared_gemm_backward")
def _shared_gemm_backward(dy: Tensor, z: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    fakes.shared_gemm_backward(dy, z, B, scaling)
    dtype = _product_dtype(dy.dtype)
    rows = dy.numel() // B.shape[0]
    parts = dy.reshape(rows, B.shape[0]).to(dtype)
    dz = torch.mm(parts, B.to(dtype)).to(z.dtype).mul_(scaling)
    dB = torch.mm(parts.t(), z.reshape(rows, B.shape[1]).to(dtype)).to(accumulate(dtype)).mul_(scaling)
    return dz.view(z.shape), dB.to(B.dtype)


@_default("adapt")
def _adapt(
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
    save_x: bool = False,
) -> tuple[Tensor, Tensor]:
    _, x = fakes.adapt(y0, index, router, B, bias, scaling, bias_in_y0, row_scale, bounded, center, save_x)
    gathered = _cluster_gather(y0, index, bias if bias_in_y0 else None, row_scale)
    wide, _, z = _route(gathered, router, bounded, center)
    if save_x:
        x = wide.sum(-2).to(y0.dtype) if fakes.keeps_sum(router, bounded) else gathered
    return _shared_gemm(y0, z, B, None if bias_in_y0 else bias, scaling), x


@_default("adapt_")
def _adapt_(y0: Tensor, *args: Any) -> None:
    y0.copy_(torch.ops.idlora.adapt.default(y0, *args)[0])  # the device's own kernel


@_default("adapt_backward")
def _adapt_backward(
    dy: Tensor,
    x: Tensor,
    index: Tensor,
    router: Tensor,
    B: Tensor,
    scaling: float,
    row_scale: Tensor | None = None,
    bounded: bool = False,
    center: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    fakes.adapt_backward(dy, x, index, router, B, scaling, row_scale, bounded, center)
    if fakes.keeps_sum(router, bounded):
        wide, a, z = _route(x.unsqueeze(-2), router, bounded, None)  # it was kept centred
    else:
        wide, a, z = _route(x, router, bounded, center)
    dz, dB = _shared_gemm_backward(dy, z, B, scaling)
    dx, drouter = _rb_scale_gradient(dz, wide, a, router, bounded, center)
    if row_scale is not None:
        dx = dx * row_scale
    dx = dx.to(dy.dtype).expand(*dy.shape[:-1], *index.shape).flatten(-2)
    # Distinct entries: no element gets two additions, so the result does not depend on their order.
    dy0 = dy.clone().scatter_add_(-1, index.flatten().long().expand_as(dx), dx)
    return dy0, drouter.to(router.dtype), dB
