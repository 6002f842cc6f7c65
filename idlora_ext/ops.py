"""The ID-LoRA operators: schemas and plain-PyTorch kernels; their gradients are in ``autograd.py``.

For one adapted layer, with ``y0 = h W^T`` the output of the frozen base layer (arXiv 2602.20727, eq. 3 and 4)::

    x_i = y0[index_i]                       cluster_gather   A_i h is a subset of the columns of h W^T
    a_i = <T_i, x_i>,  z = sum_i a_i x_i    rb_scale         one scalar per token and cluster
    y   = y0 + scaling * concat_j(B z^(j))  shared_gemm      one product for all clusters; z^(j): j-th of s parts

``adapt`` is the three fused and ``adapt_backward`` its gradient; between the two only ``x`` is kept. ``adapt_`` writes
into ``y0``.

A router of one dimension is static: ``a_i`` is a constant, one for each cluster (``[k]``) or one for all (``[1]``).
Then the update does not depend on the token: it is a matrix of rank ``r``. With one constant for all it is enough to
keep ``u = sum_i x_i``, a ``k``-th of ``x``; the gradients of ``k`` constants need each ``x_i``.

``torch.func`` (``grad``, ``vmap``, ``jvp``, ..) and forward-mode differentiation take the ops apart: they see plain
PyTorch. So does a gradient of a gradient (``create_graph=True``), in the backward pass.

Every op is registered with the dispatcher under the namespace ``idlora``. The kernels in this file are registered as
``CompositeExplicitAutograd``, the default of every device; a native module only adds CPU and CUDA kernels for the same
schemas. Kernels trust their fake to have checked the arguments: the default kernels call it to allocate their result.

Dtypes: activations in float64, float32, bfloat16 or float16. ``router``, ``B`` and ``bias`` have the activation's dtype
or float32. Router products, sums and ``z`` are float32 (float64 for float64 activations); products with ``B`` run in
the activation's dtype with float32 accumulation, except for float16, whose range ``z`` (quadratic in the activation)
would leave: there they run in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import autograd, fakes, profiling
from .fakes import accumulate
from .profiling import op_range

__all__ = ["adapt", "adapt_", "adapt_backward", "cluster_gather", "rb_scale", "shared_gemm"]

SCHEMAS = (
    "cluster_gather(Tensor y0, Tensor index, Tensor? bias=None) -> Tensor",
    "cluster_gather_backward(Tensor dx, Tensor index, SymInt d) -> Tensor",
    "rb_scale(Tensor x, Tensor router) -> Tensor",
    "rb_scale_backward(Tensor dz, Tensor x, Tensor router) -> (Tensor, Tensor)",
    "shared_gemm(Tensor y0, Tensor z, Tensor B, Tensor? bias=None, float scaling=1.0) -> Tensor",
    "shared_gemm_backward(Tensor dy, Tensor z, Tensor B, float scaling) -> (Tensor, Tensor)",
    "adapt(Tensor y0, Tensor index, Tensor router, Tensor B, Tensor? bias=None, float scaling=1.0, "
    "bool bias_in_y0=False, bool save_x=False) -> (Tensor, Tensor)",
    "adapt_(Tensor(a!) y0, Tensor index, Tensor router, Tensor B, Tensor? bias=None, float scaling=1.0, "
    "bool bias_in_y0=False) -> ()",
    "adapt_backward(Tensor dy, Tensor x, Tensor index, Tensor router, Tensor B, float scaling) "
    "-> (Tensor, Tensor, Tensor)",
)
_library = torch.library.Library("idlora", "DEF")
for _schema in SCHEMAS:
    _library.define(_schema)
    _op = _schema.partition("(")[0]
    torch.library.register_fake(f"idlora::{_op}", getattr(fakes, _op), lib=_library)
autograd.register(_library)


# Without a gradient the way through autograd's wrapper, which is Python, takes longer than the kernel of one token.
_below_autograd = torch._C._AutoDispatchBelowAutograd
_adapt_op = torch.ops.idlora.adapt.default
_adapt_in_place = torch.ops.idlora.adapt_.default


def transformed() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation is to see through what is called now."""
    if torch.compiler.is_compiling():  # which takes transforms apart itself
        return False
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def cluster_gather(y0: Tensor, index: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x_i = (y0 - bias)[index_i]``: the products ``A_i h``, read off the base layer's output.

    Args:
        y0: ``[..., d]`` base output.
        index: ``[k, r]`` int32, distinct entries in ``[0, d)`` (not checked here: it would synchronise the device).
        bias: ``[d]``, given when ``y0`` already contains the layer's bias.

    Returns:
        ``[..., k, r]`` in the dtype of ``y0``.

    Raises:
        ValueError, TypeError: on shapes, dtypes or devices that do not fit, naming op and argument.
    """
    if transformed():
        return default_kernels["cluster_gather"](y0, index, bias)
    with op_range("forward", "idlora::cluster_gather"):
        return torch.ops.idlora.cluster_gather(y0, index, bias)


def rb_scale(x: Tensor, router: Tensor) -> Tensor:
    """``a_i = <T_i, x_i>``, ``z = sum_i a_i x_i``: the routed sum over clusters (arXiv 2602.20727, §4.2).

    Args:
        x: ``[..., k, r]`` from :func:`cluster_gather`.
        router: ``T``, ``[k, r]``, or ``[1, r]``: one vector for all clusters. Static: ``a``, ``[k]`` or ``[1]``.

    Returns:
        ``z [..., r]``, float32 (float64 for float64 ``x``).

    Raises:
        ValueError, TypeError: on shapes, dtypes or devices that do not fit, naming op and argument.
    """
    if transformed():
        return default_kernels["rb_scale"](x, router)
    with op_range("forward", "idlora::rb_scale"):
        return torch.ops.idlora.rb_scale(x, router)


def shared_gemm(y0: Tensor, z: Tensor, B: Tensor, bias: Tensor | None = None, scaling: float = 1.0) -> Tensor:
    """``y = y0 + bias + scaling * concat_j(z^(j) B^T)``, ``j = 1..s``: rank boosting (arXiv 2602.20727, eq. 4).

    Args:
        y0: ``[..., d]``.
        z: ``[..., r]`` from :func:`rb_scale`, float32 (float64 for float64 ``y0``).
        B: ``[d/s, r/s]``; ``s`` follows from the shapes.
        bias: ``[d]``, added to the result.
        scaling: sigma.

    Returns:
        ``[..., d]`` in the dtype of ``y0``.

    Raises:
        ValueError, TypeError: on shapes, dtypes or devices that do not fit, naming op and argument.
    """
    if transformed():
        return _apart_shared_gemm(y0, z, B, bias, scaling)
    with op_range("forward", "idlora::shared_gemm"):
        return torch.ops.idlora.shared_gemm(y0, z, B, bias, scaling)


def adapt(
    y0: Tensor,
    index: Tensor,
    router: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    scaling: float = 1.0,
    bias_in_y0: bool = False,
) -> Tensor:
    """``y = y0 + bias + scaling * concat_j(B z^(j))``, ``z = sum_i <T_i, x_i> x_i``, ``x_i = y0[index_i]``.

    The whole adapter as an epilogue on the base layer's output (arXiv 2602.20727, eq. 3 and 4). Differentiable in
    ``y0``, ``router``, ``B`` and ``bias``; keeps ``x [..., k, r]`` for the backward pass (with one static constant
    ``u = sum_i x_i [..., r]``) and neither ``h`` nor ``y0``.

    Args:
        y0: ``[..., d]`` output of the base layer, any strides.
        index: ``[k, r]`` int32, distinct entries in ``[0, d)`` (not checked here: it would synchronise the device).
        router: ``T``, ``[k, r]`` or, shared by all clusters, ``[1, r]``; static: ``a``, ``[k]`` or ``[1]``.
        B: ``[d/s, r/s]``, the shared trainable matrix; ``s`` follows from the shapes, and both must agree.
        bias: ``[d]`` or None. By default ``y0`` comes without it and it is added to the result.
        scaling: sigma.
        bias_in_y0: the layer has added ``bias`` to ``y0`` already (an opaque layer): then ``bias[index]`` is subtracted
            from what is gathered, and nothing is added.

    Returns:
        ``y [..., d]``, a new tensor in the dtype of ``y0``.

    Raises:
        ValueError, TypeError: on shapes, dtypes or devices that do not fit, naming op and argument.
    """
    if transformed():
        z = rb_scale(cluster_gather(y0, index, bias if bias_in_y0 else None), router)
        return shared_gemm(y0, z, B, None if bias_in_y0 else bias, scaling)
    differentiable = (y0, router, B) if bias is None else (y0, router, B, bias)
    save_x = torch.is_grad_enabled() and any(t.requires_grad for t in differentiable)
    if save_x or not profiling.eager_without_ranges():
        with op_range("forward", "idlora::adapt"):
            return _adapt_op(y0, index, router, B, bias, scaling, bias_in_y0, save_x)[0]
    with _below_autograd():
        return _adapt_op(y0, index, router, B, bias, scaling, bias_in_y0, False)[0]


def adapt_(
    y0: Tensor,
    index: Tensor,
    router: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    scaling: float = 1.0,
    bias_in_y0: bool = False,
) -> Tensor:
    """:func:`adapt`, bit for bit, written into ``y0``, which is returned: for inference.

    A new tensor costs one decoded token as much as its arithmetic. Kernels that write where they read are the CPU's;
    elsewhere, for a ``y0`` of other strides and in transforms this is :func:`adapt` and a copy.

    Raises:
        RuntimeError: a gradient is wanted: use :func:`adapt`.
        ValueError, TypeError: on shapes, dtypes or devices that do not fit, naming op and argument.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (y0, router, B)):
        raise RuntimeError("idlora::adapt_: it is for inference, where nothing is differentiated; use adapt")
    if transformed():
        return y0.copy_(adapt(y0, index, router, B, bias, scaling, bias_in_y0))
    _adapt_in_place(y0, index, router, B, bias, scaling, bias_in_y0)
    return y0


def adapt_backward(
    dy: Tensor, x: Tensor, index: Tensor, router: Tensor, B: Tensor, scaling: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """``dz^(j) = scaling B^T dy^(j)``; ``da_i = <dz, x_i>``; the gradients of :func:`adapt` in one op::

        dB    = scaling * sum_n sum_j dy^(j) z^(j)^T
        dT_i  = sum_n da_i x_i                              (summed over i for a shared router)
        dy0   = dy, then dy0[index_i] += a_i dz + da_i T_i  (entries of index are distinct)

    A static router gets ``da_i`` summed over the tokens, and ``dy0[index_i] += a_i dz``.

    Args:
        dy: ``[..., d]``.
        x: ``[..., k, r]``, what :func:`cluster_gather` returned in the forward pass; with one static constant its sum
            over the clusters, ``[..., r]``.
        index, router, B, scaling: as in :func:`adapt`.

    Returns:
        ``(dy0 [..., d], dT as router, dB as B)``.

    Raises:
        ValueError, TypeError: on shapes, dtypes or devices that do not fit, naming op and argument.
    """
    with op_range("backward", "idlora::adapt_backward"):
        return torch.ops.idlora.adapt_backward(dy, x, index, router, B, scaling)


# ---- default kernels: plain PyTorch on any device --------------------------------------------------------------------

default_kernels: dict[str, Callable[..., Any]] = {}  # native kernels hand over to them what they do not serve


def _without_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel`` with autocast off: its dtypes are chosen, not inherited."""

    @functools.wraps(kernel)
    def run(first: Tensor, *args: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return kernel(first, *args)

    return run


def _default(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a kernel as the default of ``op``."""

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        default_kernels[op] = _without_autocast(kernel)
        _library.impl(op, default_kernels[op], "CompositeExplicitAutograd")
        return kernel

    return register


def _route(x: Tensor, router: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` and ``a [..., k, 1]`` (static: ``[k, 1]`` or ``[1, 1]``), ``z [..., r]`` in the accumulation dtype."""
    x = x.to(accumulate(x.dtype))
    if router.ndim == 1:
        a = router.to(x.dtype).unsqueeze(-1)
        return x, a, (a * x).sum(-2) if len(a) > 1 else a[0] * x.sum(-2)
    if router.shape[0] == 1:
        a = (x @ router[0].to(x.dtype)).unsqueeze(-1)
    else:
        a = (x * router.to(x.dtype)).sum(-1, keepdim=True)
    return x, a, (a.mT @ x).squeeze(-2)


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype


@_default("cluster_gather")
def _cluster_gather(y0: Tensor, index: Tensor, bias: Tensor | None = None) -> Tensor:
    x = fakes.cluster_gather(y0, index, bias)
    flat = index.reshape(-1)
    gathered = y0.index_select(-1, flat)
    if bias is not None:
        gathered = (gathered - bias.index_select(0, flat)).to(y0.dtype)
    return gathered.view(x.shape)


@_default("cluster_gather_backward")
def _cluster_gather_backward(dx: Tensor, index: Tensor, d: int) -> Tensor:
    dy0 = fakes.cluster_gather_backward(dx, index, d).zero_()
    return dy0.index_copy_(-1, index.reshape(-1).long(), dx.reshape(*dx.shape[:-2], index.numel()))


@_default("rb_scale")
def _rb_scale(x: Tensor, router: Tensor) -> Tensor:
    fakes.rb_scale(x, router)
    return _route(x, router)[2]


def _rb_scale_gradient(dz: Tensor, x: Tensor, a: Tensor, router: Tensor) -> tuple[Tensor, Tensor]:
    """``dx`` and ``dT`` in the dtype of ``x``, the accumulation dtype."""
    dz = dz.unsqueeze(-2)
    da = (dz * x).sum(-1, keepdim=True)
    if router.ndim == 1:
        return (a * dz).expand_as(x).contiguous(), da.squeeze(-1).sum_to_size(router.shape)
    dx = torch.addcmul(a * dz, da, router.to(x.dtype))
    return dx, (da * x).sum_to_size(router.shape)


@_default("rb_scale_backward")
def _rb_scale_backward(dz: Tensor, x: Tensor, router: Tensor) -> tuple[Tensor, Tensor]:
    fakes.rb_scale_backward(dz, x, router)
    wide, a, _ = _route(x, router)
    dx, drouter = _rb_scale_gradient(dz, wide, a, router)
    return dx.to(x.dtype), drouter.to(router.dtype)


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
def _apart_shared_gemm(y0: Tensor, z: Tensor, B: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
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
    save_x: bool = False,
) -> tuple[Tensor, Tensor]:
    _, x = fakes.adapt(y0, index, router, B, bias, scaling, bias_in_y0, save_x)
    gathered = _cluster_gather(y0, index, bias if bias_in_y0 else None)
    wide, _, z = _route(gathered, router)
    if save_x:
        x = wide.sum(-2).to(y0.dtype) if fakes.keeps_sum(router) else gathered
    return _shared_gemm(y0, z, B, None if bias_in_y0 else bias, scaling), x


@_default("adapt_")
def _adapt_(y0: Tensor, *args: Any) -> None:
    y0.copy_(_adapt_op(y0, *args)[0])  # the device's own kernel


@_default("adapt_backward")
def _adapt_backward(
    dy: Tensor, x: Tensor, index: Tensor, router: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    fakes.adapt_backward(dy, x, index, router, B, scaling)
    wide, a, z = _route(x.unsqueeze(-2) if fakes.keeps_sum(router) else x, router)
    dz, dB = _shared_gemm_backward(dy, z, B, scaling)
    dx, drouter = _rb_scale_gradient(dz, wide, a, router)
    dx = dx.to(dy.dtype).expand(*dy.shape[:-1], *index.shape).flatten(-2)
    # Distinct entries: no element gets two additions, so the result does not depend on their order.
    dy0 = dy.clone().scatter_add_(-1, index.flatten().long().expand_as(dx), dx)
    return dy0, drouter.to(router.dtype), dB
