"""The bounded router: ``z = sum_i a_i x_i`` with ``a_i`` in (0, 2), whatever the size of the activation.

In plain PyTorch, so for every device and dtype; the operators serve the linear and the static router.
"""

from __future__ import annotations

from torch import Tensor

from .fakes import accumulate

_TINY = 1e-12  # below every activation that counts; x = 0 has u = 0


def weights(x: Tensor, router: Tensor) -> Tensor:
    """``a_i = 1 + tanh(<T_i, x_i / rms(x_i)>)``.

    Args:
        x: ``[..., k, r]``, the gathered (and scaled) columns of ``y0``.
        router: ``T``, ``[k, r]`` or, shared by all clusters, ``[1, r]``.

    Returns:
        ``[..., k]``, float32 (float64 for float64 ``x``).
    """
    x = x.to(accumulate(x.dtype))
    direction = x * (x.square().mean(-1, keepdim=True) + _TINY).rsqrt()
    return 1 + (direction * router.to(x.dtype)).sum(-1).tanh()


def routed_sum(x: Tensor, router: Tensor) -> Tensor:
    """``z = sum_i a_i x_i``, ``[..., r]``, float32 (float64 for float64 ``x``); differentiable in both."""
    a = weights(x, router)
    return (a.unsqueeze(-1) * x).sum(-2)  # a product with `@` would run in autocast's dtype
