"""Where the linear router starts."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def start_router(router: Tensor, weight: Tensor, index: Tensor, seed: int, scale: Tensor | None = None) -> None:
    """``T_j ~ N(0, 1 / (k r w_j^2))``, ``w_j`` the norm of the chosen row (its mean over clusters if ``T`` is shared),
    with ``row_scale`` that of the scaled row, ``c_ij ||W[index_ij]||``.

    For an input of unit variance ``x_ij`` has the size ``w_j``, so all ``r`` terms of ``a_i`` have one size, ``a_i``
    starts at about ``1 / sqrt(k)``, and the first gradient of ``B`` is about that of a product with one ``A_i h``.
    Other starts were tried on real activations, see docs/design/router_start.md.
    """
    if weight.is_meta or router.is_meta:  # PEFT's low_cpu_mem_usage: only the router is to come from a file
        return
    k, r = index.shape
    norms = weight[index.flatten().long()].float().norm(dim=1).view(k, r)
    if scale is not None:
        norms = norms * scale
    if router.shape[0] == 1:
        norms = norms.mean(0, keepdim=True)
    normal = torch.randn(router.shape, generator=torch.Generator().manual_seed(seed)).to(router.device)
    floor = torch.finfo(torch.float32).tiny ** 0.5  # rows of zeros: their x is zero too
    router.copy_(torch.where(norms > floor, normal / (norms.clamp_min(floor) * math.sqrt(k * r)), 0))
