"""The bounded router: ``z = sum_i a_i x_i`` with ``a_i`` in [0, 2], whatever the size of the activation.

In plain PyTorch, so for every device and dtype; the operators serve the linear and the static router. Of activations
only ``x`` is kept for the backward pass. Forms were tried on real activations, see docs/bounded_router.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .fakes import accumulate
from .ops import transformed

# How fast a_i moves beside B at one learning rate; by experiment at r = 32, as the form is.
_GAIN = 4.0
_TINY = 1e-12  # below the square of any activation that counts: x = 0 has u = 0


def weights(x: Tensor, router: Tensor) -> Tensor:
    """``a_i = 1 + tanh(u_i)``, ``u_i = 4 <T_i, x_i / rms(x_i)>``.

    Args:
        x: ``[..., k, r]``, the gathered (and scaled) columns of ``y0``.
        router: ``T``, ``[k, r]`` or, shared by all clusters, ``[1, r]``.

    Returns:
        ``[..., k]``, float32 (float64 for float64 ``x``).
    """
    return 1 + _parts(x, router)[-1].tanh().squeeze(-1)


def routed_sum(x: Tensor, router: Tensor) -> Tensor:
    """``z = sum_i a_i x_i``, ``[..., r]``, float32 (float64 for float64 ``x``); differentiable in both::

        da_i = <dz, x_i>,  du_i = da_i (1 - tanh(u_i)^2)
        dx_i = a_i dz + du_i (4 T_i - u_i x_i / (r rms(x_i))) / rms(x_i)
        dT_i = sum_n 4 du_i x_i / rms(x_i)                                (summed over i for a shared router)

    Arguments as for :func:`weights`.
    """
    if transformed():
        return _routed_sum(x, router)
    z: Tensor = _RoutedSum.apply(x, router)
    return z


def _routed_sum(x: Tensor, router: Tensor) -> Tensor:
    return (weights(x, router).unsqueeze(-1) * x).sum(-2)


def _parts(x: Tensor, router: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``x``, ``4 T``, ``1 / rms(x)``, ``x / rms(x)`` and ``u [..., k, 1]`` in the accumulation dtype."""
    x, T = x.to(accumulate(x.dtype)), _GAIN * router.to(accumulate(x.dtype))
    inverse = (x.square().mean(-1, keepdim=True) + _TINY).rsqrt()
    direction = x * inverse
    # Sums of products and no `@`, which would run in autocast's dtype.
    return x, T, inverse, direction, (direction * T).sum(-1, keepdim=True)


class _RoutedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, router: Tensor) -> Tensor:
        ctx.save_for_backward(x, router)
        return _routed_sum(x, router)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, Tensor]:
        narrow, router = ctx.saved_tensors
        x, T, inverse, direction, u = _parts(narrow, router)
        dz, tanh = dz.unsqueeze(-2), u.tanh()
        du = (dz * x).sum(-1, keepdim=True) * (1 - tanh.square())
        dx = (1 + tanh) * dz + du * inverse * (T - u * direction / x.shape[-1])
        return dx.to(narrow.dtype), (_GAIN * du * direction).sum_to_size(router.shape).to(router.dtype)
