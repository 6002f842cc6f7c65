"""The gradients of the operators, for the dispatcher; the kernels they call are operators themselves.

A gradient of a gradient goes through the default kernels, which autograd sees through. What it then asks of the ``x``
that ``adapt`` has kept comes back as that output's gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import fakes
from .default_kernels import centred_gradient, default_kernels
from .fakes import accumulate
from .nvtx import current_layer, op_range


def register(library: torch.library.Library) -> None:
    """Give the operators that ``library`` defines their gradients."""
    for op, context, backward in (
        ("cluster_gather", _cluster_gather_context, _cluster_gather_autograd),
        ("rb_scale", _rb_scale_context, _rb_scale_autograd),
        ("shared_gemm", _shared_gemm_context, _shared_gemm_autograd),
        ("adapt", _adapt_context, _adapt_autograd),
    ):
        torch.library.register_autograd(f"idlora::{op}", backward, setup_context=_with_layer(context), lib=library)


def _kernel(op: str) -> Callable[..., Any]:
    return default_kernels[op] if torch.is_grad_enabled() else getattr(torch.ops.idlora, op)


def _cluster_gather_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y0, index, bias, row_scale = inputs
    ctx.save_for_backward(index, row_scale)
    ctx.d = y0.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _cluster_gather_autograd(ctx: Any, dx: Tensor) -> tuple[Any, ...]:
    index, row_scale = ctx.saved_tensors
    with op_range("backward", "idlora::cluster_gather_backward", ctx.layer):
        dy0 = _kernel("cluster_gather_backward")(dx.contiguous(), index, ctx.d, row_scale)
    dbias = -_sum_to_bias(dy0, ctx.bias_dtype) if _needs_bias(ctx, 2) else None
    return dy0, None, dbias, None


def _rb_scale_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, router, ctx.bounded, center = inputs
    ctx.save_for_backward(x, router, center)


def _rb_scale_autograd(ctx: Any, dz: Tensor) -> tuple[Any, ...]:
    x, router, center = ctx.saved_tensors
    with op_range("backward", "idlora::rb_scale_backward", ctx.layer):
        return *_kernel("rb_scale_backward")(dz.contiguous(), x, router, ctx.bounded, center), None, None


def _shared_gemm_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, z, B, bias, ctx.scaling = inputs
    ctx.save_for_backward(z, B)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _shared_gemm_autograd(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    dy, saved = dy.contiguous(), ctx.saved_tensors
    with op_range("backward", "idlora::shared_gemm_backward", ctx.layer):
        dz, dB = _kernel("shared_gemm_backward")(dy, *saved, ctx.scaling)
    dbias = _sum_to_bias(dy, ctx.bias_dtype) if _needs_bias(ctx, 3) else None
    return dy, dz, dB, dbias, None


def _adapt_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, index, router, B, bias, ctx.scaling, ctx.bias_in_y0, row_scale, ctx.bounded, center, save_x = inputs
    x = output[1]
    if not save_x:
        ctx.mark_non_differentiable(x)
    ctx.set_materialize_grads(False)  # or every backward pass would begin by writing zeros of the size of x
    ctx.save_for_backward(x if save_x else None, index, router, B, row_scale, center)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _adapt_autograd(ctx: Any, dy: Tensor | None, dx_kept: Tensor | None) -> tuple[Any, ...]:
    dy0 = drouter = dB = dbias = None
    if dy is not None:
        dy0, drouter, dB, dbias = _gradients_of_y(ctx, dy.contiguous())
    if dx_kept is not None:
        _, index, router, B, row_scale, center = ctx.saved_tensors
        if fakes.keeps_sum(router, ctx.bounded):
            dx_kept = _of_each(dx_kept.unsqueeze(-2), center)
        kept = _scattered(dx_kept, index, B, row_scale)
        dy0 = kept if dy0 is None else dy0 + kept
        if _needs_bias(ctx, 4) and ctx.bias_in_y0:
            less = _sum_to_bias(kept, ctx.bias_dtype)
            dbias = -less if dbias is None else dbias - less
    return dy0, None, drouter, dB, dbias, *(None,) * 6


def _gradients_of_y(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    x, index, router, B, row_scale, center = ctx.saved_tensors
    if x is None:
        raise RuntimeError(
            "idlora::adapt: the forward pass ran with save_x=False, so there is nothing to differentiate"
        )
    with op_range("backward", "idlora::adapt_backward", ctx.layer):
        dy0, drouter, dB = _kernel("adapt_backward")(
            dy, x, index, router, B, ctx.scaling, row_scale, ctx.bounded, center
        )
    dbias = None
    if _needs_bias(ctx, 4) and not ctx.bias_in_y0:
        dbias = _sum_to_bias(dy, ctx.bias_dtype)
    elif _needs_bias(ctx, 4):
        # It is subtracted from the gathered columns, so it sees -dx. Taken anew, as dy - dy0 has lost dx's last digits.
        summed = fakes.keeps_sum(router, ctx.bounded)
        routed = (x.unsqueeze(-2), router, ctx.bounded, None) if summed else (x, router, ctx.bounded, center)
        z = _kernel("rb_scale")(*routed)
        dz, _ = _kernel("shared_gemm_backward")(dy, z, B, ctx.scaling)
        dx, _ = _kernel("rb_scale_backward")(dz, *routed)
        dx = _of_each(dx, center) if summed else dx
        dbias = -_sum_to_bias(_scattered(dx, index, B, row_scale), ctx.bias_dtype)
    return dy0, drouter, dB, dbias


def _scattered(dx: Tensor, index: Tensor, B: Tensor, row_scale: Tensor | None) -> Tensor:
    """``dy0`` of ``dx [..., k, r]``, or ``[..., 1, r]``, the same for all clusters."""
    d = B.shape[0] * (index.shape[1] // B.shape[1])
    dx = dx.expand(*dx.shape[:-2], *index.shape).contiguous()
    return _kernel("cluster_gather_backward")(dx, index, d, row_scale)


def _of_each(du: Tensor, center: Tensor | None) -> Tensor:
    """``dx``, the same for all clusters, from the gradient of their sum as it is kept, which is centred."""
    return centred_gradient(du.to(accumulate(du.dtype)), center).to(du.dtype)


def _with_layer(context: Callable[..., None]) -> Callable[..., None]:
    """The backward range is to name the layer. It opens after ``saved_tensors``, which may run a checkpointed block."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.layer = current_layer()
        context(ctx, inputs, output)

    return setup


def _needs_bias(ctx: Any, position: int) -> bool:
    # The dispatcher drops trailing arguments that have their default value, so the tuple may end before the bias.
    return ctx.bias_dtype is not None and ctx.needs_input_grad[position]


def _sum_to_bias(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    return gradient.to(accumulate(gradient.dtype)).sum_to_size(gradient.shape[-1:]).to(dtype)
