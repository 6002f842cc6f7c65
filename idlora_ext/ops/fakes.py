"""What the operators accept and return: every shape, dtype and device check, and the shapes of the results.

These are the operators' fakes. They run while a model is compiled or built on the meta device, and the default kernels
call them first. A message says which op, which argument, what was expected and what was got.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _shape(op: str, argument: str, tensor: Tensor, expected: str, ok: bool) -> None:
    if not ok:
        raise ValueError(f"idlora::{op}: {argument} must be {expected}, got shape {list(tensor.shape)}")


def _check_activation(op: str, argument: str, t: Tensor, ndim: int, expected: str) -> None:
    if t.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"idlora::{op}: {argument} must be float64, float32, bfloat16 or float16, got {_name(t.dtype)}")
    _shape(op, argument, t, expected, t.ndim >= ndim)


def _check_parameter(op: str, argument: str, t: Tensor, like: Tensor) -> None:
    if t.dtype != like.dtype and (t.dtype != torch.float32 or like.dtype == torch.float64):
        wider = "" if like.dtype in (torch.float32, torch.float64) else " or float32"
        raise TypeError(f"idlora::{op}: {argument} must be {_name(like.dtype)}{wider}, got {_name(t.dtype)}")
    _check_device(op, argument, t, like)


def _check_device(op: str, argument: str, t: Tensor, like: Tensor) -> None:
    if t.device != like.device:
        raise ValueError(f"idlora::{op}: {argument} must be on the activation's device {like.device}, got {t.device}")


def _check_index(op: str, index: Tensor, like: Tensor) -> None:
    if index.dtype != torch.int32:
        raise TypeError(f"idlora::{op}: index must be int32, got {_name(index.dtype)}")
    _shape(op, "index", index, "[k, r] with k, r >= 1", index.ndim == 2 and index.shape[0] >= 1 and index.shape[1] >= 1)
    _check_device(op, "index", index, like)


def _check_router(op: str, router: Tensor, k: int, r: int, like: Tensor, bounded: bool) -> None:
    if bounded:
        _shape(op, "router", router, f"[1, r] = [1, {r}], as a bounded one is", router.shape == (1, r))
    ok = router.ndim in (1, 2) and router.shape[1:] in ((), (r,)) and (router.shape[0] == k or router.shape[0] == 1)
    expected = f"[k, r] = [{k}, {r}] or [1, r] = [1, {r}], or static: [k] = [{k}] or [1]"
    _shape(op, "router", router, expected, ok)
    _check_parameter(op, "router", router, like)


def _check_B(op: str, B: Tensor, d: int, r: int, like: Tensor) -> None:
    ok = B.ndim == 2 and B.shape[1] >= 1 and r % B.shape[1] == 0 and B.shape[0] * (r // B.shape[1]) == d
    _shape(op, "B", B, f"[d/s, r/s] for one s that divides d = {d} and r = {r}", ok)
    _check_parameter(op, "B", B, like)


def _check_bias(op: str, bias: Tensor | None, d: int, like: Tensor) -> None:
    if bias is not None:
        _shape(op, "bias", bias, f"[d] = [{d}]", bias.ndim == 1 and bias.shape[0] == d)
        _check_parameter(op, "bias", bias, like)


def _check_row_scale(op: str, row_scale: Tensor | None, index: Tensor) -> None:
    if row_scale is not None:
        expected = list(index.shape)
        _shape(op, "row_scale", row_scale, f"[k, r] = {expected}", row_scale.shape == index.shape)
        if row_scale.dtype != torch.float32:
            raise TypeError(f"idlora::{op}: row_scale must be float32, got {_name(row_scale.dtype)}")
        _check_device(op, "row_scale", row_scale, index)


def _check_center(op: str, center: Tensor | None, router: Tensor, r: int, like: Tensor, bounded: bool) -> None:
    if center is not None:
        if router.ndim == 2 and not bounded:
            raise ValueError(f"idlora::{op}: center must be None with a linear router, got shape {list(center.shape)}")
        _shape(op, "center", center, f"[2, r] = [2, {r}]", center.shape == (2, r))
        if center.dtype != torch.float32:
            raise TypeError(f"idlora::{op}: center must be float32, got {_name(center.dtype)}")
        _check_device(op, "center", center, like)


def _check_z(op: str, argument: str, z: Tensor, like: Tensor, r: int | None = None) -> None:
    leading = like.shape[:-1]
    expected = f"[..., r] with leading dimensions {list(leading)}" + ("" if r is None else f" and r = {r}")
    _shape(op, argument, z, expected, z.ndim >= 1 and z.shape[:-1] == leading and (r is None or z.shape[-1] == r))
    if z.dtype != accumulate(like.dtype):
        raise TypeError(f"idlora::{op}: {argument} must be {_name(accumulate(like.dtype))}, got {_name(z.dtype)}")
    _check_device(op, argument, z, like)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def keeps_sum(router: Tensor, bounded: bool) -> bool:
    """Whether ``u = sum_i x_i``, centred, is enough for the backward pass: one weight for all clusters."""
    return bounded or (router.ndim == 1 and router.shape[0] == 1)


def cluster_gather(y0: Tensor, index: Tensor, bias: Tensor | None = None, row_scale: Tensor | None = None) -> Tensor:
    op = "cluster_gather"
    _check_activation(op, "y0", y0, 1, "[..., d]")
    _check_index(op, index, y0)
    _shape(op, "index", index, f"[k, r] with k * r <= d = {y0.shape[-1]}", index.numel() <= y0.shape[-1])
    _check_bias(op, bias, y0.shape[-1], y0)
    _check_row_scale(op, row_scale, index)
    return y0.new_empty(*y0.shape[:-1], *index.shape)


def cluster_gather_backward(dx: Tensor, index: Tensor, d: int, row_scale: Tensor | None = None) -> Tensor:
    _check_activation("cluster_gather_backward", "dx", dx, 2, "[..., k, r]")
    _check_index("cluster_gather_backward", index, dx)
    _shape("cluster_gather_backward", "dx", dx, f"[..., *{list(index.shape)}]", dx.shape[-2:] == index.shape)
    _check_row_scale("cluster_gather_backward", row_scale, index)
    return dx.new_empty(*dx.shape[:-2], d)


def rb_scale(x: Tensor, router: Tensor, bounded: bool = False, center: Tensor | None = None) -> Tensor:
    _check_activation("rb_scale", "x", x, 2, "[..., k, r]")
    _check_router("rb_scale", router, x.shape[-2], x.shape[-1], x, bounded)
    _check_center("rb_scale", center, router, x.shape[-1], x, bounded)
    return x.new_empty(*x.shape[:-2], x.shape[-1], dtype=accumulate(x.dtype))


def rb_scale_backward(
    dz: Tensor, x: Tensor, router: Tensor, bounded: bool = False, center: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _check_activation("rb_scale_backward", "x", x, 2, "[..., k, r]")
    _check_router("rb_scale_backward", router, x.shape[-2], x.shape[-1], x, bounded)
    _check_center("rb_scale_backward", center, router, x.shape[-1], x, bounded)
    _check_z("rb_scale_backward", "dz", dz, x[..., 0, :], x.shape[-1])
    return x.new_empty(x.shape), router.new_empty(router.shape)


def shared_gemm(y0: Tensor, z: Tensor, B: Tensor, bias: Tensor | None = None, scaling: float = 1.0) -> Tensor:
    op = "shared_gemm"
    _check_activation(op, "y0", y0, 1, "[..., d]")
    _check_z(op, "z", z, y0)
    _check_B(op, B, y0.shape[-1], z.shape[-1], y0)
    _check_bias(op, bias, y0.shape[-1], y0)
    return y0.new_empty(y0.shape)


def shared_gemm_backward(dy: Tensor, z: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    _check_activation("shared_gemm_backward", "dy", dy, 1, "[..., d]")
    _check_z("shared_gemm_backward", "z", z, dy)
    _check_B("shared_gemm_backward", B, dy.shape[-1], z.shape[-1], dy)
    return z.new_empty(z.shape), B.new_empty(B.shape)


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
    save_x: bool = False,
) -> tuple[Tensor, Tensor]:
    op = "adapt"
    _check_activation(op, "y0", y0, 1, "[..., d]")
    d = y0.shape[-1]
    _check_index(op, index, y0)
    k, r = index.shape
    _shape(op, "index", index, f"[k, r] with k * r <= d = {d}", k * r <= d)
    _check_router(op, router, k, r, y0, bounded)
    _check_center(op, center, router, r, y0, bounded)
    _check_B(op, B, d, r, y0)
    _check_bias(op, bias, d, y0)
    _check_row_scale(op, row_scale, index)
    if bias_in_y0 and bias is None:
        raise ValueError("idlora::adapt: bias_in_y0=True needs the bias that y0 contains, got bias=None")
    kept = (r,) if keeps_sum(router, bounded) else (k, r)
    return y0.new_empty(y0.shape), y0.new_empty(*y0.shape[:-1], *kept) if save_x else y0.new_empty(0)


def adapt_(y0: Tensor, index: Tensor, router: Tensor, B: Tensor, *args: Any) -> None:
    adapt(y0, index, router, B, *args)


def adapt_backward(
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
    op = "adapt_backward"
    _check_activation(op, "dy", dy, 1, "[..., d]")
    _check_index(op, index, dy)
    k, r = index.shape
    _check_router(op, router, k, r, dy, bounded)
    _check_center(op, center, router, r, dy, bounded)
    _check_row_scale(op, row_scale, index)
    kept = keeps_sum(router, bounded)
    sizes = [*dy.shape[:-1], r] if kept else [*dy.shape[:-1], k, r]
    _shape(op, "x", x, f"[..., r] = {sizes}" if kept else f"[..., k, r] = {sizes}", list(x.shape) == sizes)
    if x.dtype != dy.dtype:
        raise TypeError(f"idlora::{op}: x must be {_name(dy.dtype)}, got {_name(x.dtype)}")
    _check_device(op, "x", x, dy)
    _check_B(op, B, dy.shape[-1], r, dy)
    return dy.new_empty(dy.shape), router.new_empty(router.shape), B.new_empty(B.shape)
