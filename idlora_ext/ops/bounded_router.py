"""The bounded router: one weight a token for all clusters, in [0, 2] whatever the size of the activation.

``z = a u``, ``u = sum_i x_i``, or that centred. What is here is the definition, in plain PyTorch, which the default
kernels call; forms were tried on real activations, see docs/design/bounded_router.md.
"""

from __future__ import annotations

from torch import Tensor

from .fakes import accumulate

# How fast a moves beside B at one learning rate; by experiment at r = 32, as the form is. Kernels have it too.
_GAIN = 4.0
_TINY = 1e-24  # below the square of any activation that counts: u = 0 has t = 0


def weight(u: Tensor, router: Tensor) -> Tensor:
    """``a = 1 + tanh(t)``, ``t = 4 <T, u / rms(u)>``.

    Args:
        u: ``[..., r]``, the sum over the clusters of the gathered (and scaled) columns of ``y0``, centred if there is a
            center.
        router: ``T``, ``[1, r]``.

    Returns:
        ``[...]``, float32 (float64 for float64 ``u``).
    """
    return 1 + _parts(u, router)[-1].tanh().squeeze(-1)


def gradients(dz: Tensor, u: Tensor, router: Tensor) -> tuple[Tensor, Tensor]:
    """Those of ``z = a u``, which every ``x_i`` gets, and of the router for each token::

        dt = <dz, u> (1 - tanh(t)^2)
        du = a dz + dt (4 T - t u / (r rms(u))) / rms(u),  dT = 4 dt u / rms(u)

    Args:
        dz: ``[..., r]``.
        u, router: as for :func:`weight`.

    Returns:
        ``(du, dT)``, both ``[..., r]``, float32 (float64 for float64 ``u``).
    """
    u, T, inverse, t = _parts(u, router)
    tanh = t.tanh()
    dt = (dz * u).sum(-1, keepdim=True) * (1 - tanh.square())
    direction = u * inverse
    du = (1 + tanh) * dz + dt * inverse * (T - t * direction / u.shape[-1])
    return du, _GAIN * dt * direction


def _parts(u: Tensor, router: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``u``, ``4 T [r]``, ``1 / rms(u)`` and ``t``, both ``[..., 1]``, in the accumulation dtype."""
    u, T = u.to(accumulate(u.dtype)), _GAIN * router[0].to(accumulate(u.dtype))
    inverse = (u.square().mean(-1, keepdim=True) + _TINY).rsqrt()
    # A sum of products and no `@`, which would run in autocast's dtype.
    return u, T, inverse, (u * inverse * T).sum(-1, keepdim=True)
