"""The six public operators; their equations are in the docstring of :mod:`idlora_ext.ops`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import (
    library,  # noqa: F401  (it defines torch.ops.idlora)
    nvtx,
)
from .default_kernels import apart_shared_gemm, default_kernels
from .nvtx import op_range

# Without a gradient the way through autograd's wrapper, which is Python, takes longer than the kernel of one token.
_below_autograd = torch._C._AutoDispatchBelowAutograd
_adapt_op = torch.ops.idlora.adapt.default
adapt_in_place = torch.ops.idlora.adapt_.default  # what adapt_ calls where undisturbed()


def transformed() -> bool:
    """Whether ``torch.func``, forward-mode differentiation or ``torch.export`` is to see through what is called now."""
    if torch.compiler.is_compiling():  # which takes transforms apart itself
        return torch.compiler.is_exporting()  # a program that runs where this package is not
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def undisturbed() -> bool:
    """Whether what is called now is executed and no more: no gradient, compiler, transform or range is to see it."""
    return not (
        torch.compiler.is_compiling()  # first, so that a compiler never looks at the rest
        or torch.is_grad_enabled()
        or nvtx.domain is not None
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )


def cluster_gather(y0: Tensor, index: Tensor, bias: Tensor | None = None, row_scale: Tensor | None = None) -> Tensor:
    """``x_ij = c_ij (y0 - bias)[index_ij]``: the products ``A_i h``, read off the base layer's output.

    Args:
        y0: ``[..., d]`` base output.
        index: ``[k, r]`` int32, distinct entries in ``[0, d)`` (not checked here: it would synchronise the device).
        bias: ``[d]``, given when ``y0`` already contains the layer's bias.
        row_scale: ``c [k, r]`` float32, not differentiated; 1 by default.

    Returns:
        ``[..., k, r]`` in the dtype of ``y0``.

    Raises:
        ValueError, TypeError: on shapes, dtypes or devices that do not fit, naming op and argument.
    """
    if transformed():
        return default_kernels["cluster_gather"](y0, index, bias, row_scale)
    with op_range("forward", "idlora::cluster_gather"):
        return torch.ops.idlora.cluster_gather(y0, index, bias, row_scale)


def rb_scale(x: Tensor, router: Tensor, bounded: bool = False, center: Tensor | None = None) -> Tensor:
    """``a_i = <T_i, x_i>``, ``z = sum_i a_i x_i``: the routed sum over clusters (arXiv 2602.20727, §4.2).

    Args:
        x: ``[..., k, r]`` from :func:`cluster_gather`.
        router: ``T``, ``[k, r]``, or ``[1, r]``: one vector for all clusters. Static: ``a``, ``[k]`` or ``[1]``.
        bounded: ``z = a sum_i x_i`` with the weight of :func:`idlora_ext.ops.bounded_router.weight`; ``T`` is
            ``[1, r]``.
        center: ``ubar`` and ``w``, ``[2, r]`` float32, not differentiated: ``P u = u - ubar <w, u>`` takes the place of
            ``u``, the sum of a static router or of a bounded one; with a linear router there is none.

    Returns:
        ``z [..., r]``, float32 (float64 for float64 ``x``).

    Raises:
        ValueError, TypeError: on shapes, dtypes or devices that do not fit, naming op and argument.
    """
    if transformed():
        return default_kernels["rb_scale"](x, router, bounded, center)
    with op_range("forward", "idlora::rb_scale"):
        return torch.ops.idlora.rb_scale(x, router, bounded, center)


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
        return apart_shared_gemm(y0, z, B, bias, scaling)
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
    row_scale: Tensor | None = None,
    bounded: bool = False,
    center: Tensor | None = None,
) -> Tensor:
    """``y = y0 + bias + scaling * concat_j(B z^(j))``, ``z = sum_i <T_i, x_i> x_i``, ``x_i = y0[index_i]``.

    The whole adapter as an epilogue on the base layer's output (arXiv 2602.20727, eq. 3 and 4). Differentiable in
    ``y0``, ``router``, ``B`` and ``bias``; keeps ``x [..., k, r]`` for the backward pass (with one static constant or a
    bounded router ``u = sum_i x_i [..., r]``, of a centred one ``P u``) and neither ``h`` nor ``y0``.

    Args:
        y0: ``[..., d]`` output of the base layer, any strides.
        index: ``[k, r]`` int32, distinct entries in ``[0, d)`` (not checked here: it would synchronise the device).
        router: ``T``, ``[k, r]`` or, shared by all clusters, ``[1, r]``; static: ``a``, ``[k]`` or ``[1]``.
        B: ``[d/s, r/s]``, the shared trainable matrix; ``s`` follows from the shapes, and both must agree.
        bias: ``[d]`` or None. By default ``y0`` comes without it and it is added to the result.
        scaling: sigma.
        bias_in_y0: the layer has added ``bias`` to ``y0`` already (an opaque layer): then ``bias[index]`` is subtracted
            from what is gathered, and nothing is added.
        row_scale: ``c [k, r]`` float32, not differentiated: then ``x_ij = c_ij y0[index_ij]``.
        bounded: ``z = a sum_i x_i`` with the weight of :func:`idlora_ext.ops.bounded_router.weight`; ``T`` is
            ``[1, r]``.
        center: ``ubar`` and ``w``, ``[2, r]`` float32, not differentiated: ``P u = u - ubar <w, u>`` takes the place of
            ``u``, the sum of a static router or of a bounded one; with a linear router there is none.

    Returns:
        ``y [..., d]``, a new tensor in the dtype of ``y0``.

    Raises:
        ValueError, TypeError: on shapes, dtypes or devices that do not fit, naming op and argument.
    """
    if transformed():
        z = rb_scale(cluster_gather(y0, index, bias if bias_in_y0 else None, row_scale), router, bounded, center)
        return shared_gemm(y0, z, B, None if bias_in_y0 else bias, scaling)
    differentiable = (y0, router, B) if bias is None else (y0, router, B, bias)
    save_x = torch.is_grad_enabled() and any(t.requires_grad for t in differentiable)
    if save_x or not nvtx.eager_without_ranges():
        with op_range("forward", "idlora::adapt"):
            return _adapt_op(y0, index, router, B, bias, scaling, bias_in_y0, row_scale, bounded, center, save_x)[0]
    with _below_autograd():
        return _adapt_op(y0, index, router, B, bias, scaling, bias_in_y0, row_scale, bounded, center, False)[0]


def adapt_(
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
        return y0.copy_(adapt(y0, index, router, B, bias, scaling, bias_in_y0, row_scale, bounded, center))
    adapt_in_place(y0, index, router, B, bias, scaling, bias_in_y0, row_scale, bounded, center)
    return y0


def adapt_backward(
    dy: Tensor,
    x: Tensor,
    index: Tensor,
    router: Tensor,
    B: Tensor,
    scaling: float = 1.0,
    row_scale: Tensor | None = None,
    bounded: bool = False,
    center: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dz^(j) = scaling B^T dy^(j)``; ``da_i = <dz, x_i>``; the gradients of :func:`adapt` in one op::

        dB    = scaling * sum_n sum_j dy^(j) z^(j)^T
        dT_i  = sum_n da_i x_i                              (summed over i for a shared router)
        dy0   = dy, then dy0[index_i] += a_i dz + da_i T_i  (entries of index are distinct)

    A static router gets ``da_i`` summed over the tokens, and ``dy0[index_i] += a_i dz``; a bounded one what
    :func:`idlora_ext.ops.bounded_router.gradients` says.
    With a row scale ``dy0[index_ij]`` gets ``c_ij`` times as much. With a center what the ``x_i`` get goes through
    ``P^T g = g - w <ubar, g>``; with ``k`` constants ``da_i = <P^T dz, x_i>``.

    Args:
        dy: ``[..., d]``.
        x: ``[..., k, r]``, what :func:`cluster_gather` returned in the forward pass; with one static constant or a
            bounded router its sum over the clusters, centred, ``[..., r]``.
        index, router, B, scaling, row_scale, bounded, center: as in :func:`adapt`.

    Returns:
        ``(dy0 [..., d], dT as router, dB as B)``.

    Raises:
        ValueError, TypeError: on shapes, dtypes or devices that do not fit, naming op and argument.
    """
    with op_range("backward", "idlora::adapt_backward"):
        return torch.ops.idlora.adapt_backward(dy, x, index, router, B, scaling, row_scale, bounded, center)
