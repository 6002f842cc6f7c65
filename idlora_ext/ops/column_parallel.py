"""The operators where a rank has some columns of ``y0``: what they ask of other ranks, and what each returns."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .functional import shared_gemm


class Columns:
    """The columns ``[first, last)`` of ``y0 [..., d]`` that this rank has, of a layer sharded by columns.

    ``x`` is the sum over ranks of what each has of it, zeros elsewhere; ``z`` and the adapter's gradients are the same
    on all ranks, and each rank applies its part of ``concat_j(B z^(j))``.
    """

    def __init__(self, weight: Any) -> None:
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
        self.first, self.last = offset[0], offset[0] + shape[0]
        self.group = weight.device_mesh.get_group()

    def gather(self, y0: Tensor, index: Tensor, bias: Tensor | None, row_scale: Tensor | None) -> Tensor:
        """``x [..., k, r]``, the same on all ranks; ``bias`` is this rank's part if ``y0`` contains it."""
        column = index.long() - self.first
        here = (column >= 0) & (column < self.last - self.first)
        column = column.clamp(0, self.last - self.first - 1)
        x = y0[..., column]
        if bias is not None:
            x = (x - bias[column]).to(y0.dtype)
        x = _Sum.apply(torch.where(here, x, 0), self.group)
        return x if row_scale is None else (x * row_scale).to(y0.dtype)

    def shared_gemm(self, y0: Tensor, z: Tensor, B: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
        """``y0 + bias + scaling * concat_j(B z^(j))``, this rank's columns: of each part ``j``, some rows of ``B``."""
        z, B = _SumGradient.apply(z, self.group), _SumGradient.apply(B, self.group)
        rows = B.shape[0]
        pieces = []
        for j, z_j in enumerate(z.unflatten(-1, (-1, B.shape[1])).unbind(-2)):
            first, last = max(self.first, j * rows), min(self.last, (j + 1) * rows)
            if first < last:
                here = slice(first - self.first, last - self.first)
                piece = B[first - j * rows : last - j * rows]
                added = None if bias is None else bias[here]
                pieces.append(shared_gemm(y0[..., here], z_j.contiguous(), piece, added, scaling))
        return torch.cat(pieces, -1)


class _Sum(torch.autograd.Function):
    """The sum over ranks; its gradient is the same on all ranks, and each rank's as it is."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(tensor, group=group)
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _SumGradient(torch.autograd.Function):
    """What all ranks have alike; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None
