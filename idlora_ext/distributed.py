"""Several processes: whole weights from sharded ones, rows chosen once and shared, column-parallel layers.

Rows are chosen by one rank a layer and exchanged, so all ranks end with the same tensors. Whoever adds an adapter while
``torch.distributed`` is initialised does so on every rank, as with any collective operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import ops
from .base_weight import stored
from .fakes import accumulate

if TYPE_CHECKING:
    from .layer import IdLoraLayer

if dist.is_available():
    from torch.distributed.tensor import DTensor, Replicate, Shard
else:  # a build of torch without it: then nothing is ever sharded
    DTensor = type("DTensor", (), {})  # type: ignore[assignment, misc]

Choose = Callable[[str, "IdLoraLayer", Tensor], None]


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_sharded(weight: Tensor) -> bool:
    """Whether reading the whole of ``weight`` takes all ranks: FSDP2, tensor parallelism, DeepSpeed ZeRO-3."""
    return isinstance(weight, DTensor) or hasattr(weight, "ds_shape")


def whole(parameter: Tensor, read: Callable[[], Tensor]) -> Tensor:
    """What ``read`` returns of ``parameter``, gathered: every rank must call this if ``parameter`` is sharded."""
    if hasattr(parameter, "ds_shape"):  # DeepSpeed ZeRO-3: shape [0] outside of this context
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None):
            return read().detach().clone()
    weight: Any = read()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def full(tensor: Tensor) -> Tensor:
    """A tensor of a state dictionary, gathered: every rank must call this if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def unsupported(layer: Any, dropout: float) -> str | None:
    """Why a layer whose weight is not whole cannot be adapted, or None."""
    weight = getattr(layer, "weight", None)
    if isinstance(weight, DTensor):
        # ("fsdp",): transformers' own sharding on loading, whose Trainer keeps adapters that come later in step.
        if weight.device_mesh.mesh_dim_names not in (("tp",), ("fsdp",)):
            return "already sharded by FSDP: add the adapter first, so that it is sharded with its layer"
        if any(type(placement) not in (Shard, Replicate) for placement in weight.placements):
            return f"its rows are dealt out to the ranks out of order: {weight.placements}"
        if dropout and weight.device_mesh.mesh_dim_names == ("tp",):
            return "tensor-parallel: dropout would differ between ranks and must be 0"
    elif isinstance(weight, Tensor) and weight.numel() == 0 and not hasattr(weight, "ds_shape"):
        return f"its weight has shape {list(weight.shape)}: partitioned, and not by DeepSpeed, which could gather it"
    return None


@contextmanager
def gathered(model: nn.Module, prefix: str) -> Iterator[None]:
    """Inside, parameters with ``prefix`` in their names that DeepSpeed ZeRO-3 has partitioned are whole."""
    partitioned = [p for name, p in model.named_parameters() if prefix in name and hasattr(p, "ds_shape")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=None):
        yield


def exchange(value: Any) -> list[Any]:
    """The values of all ranks, by rank."""
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_first_rank(work: Callable[[], None]) -> None:
    """Do ``work`` on rank 0; all ranks wait for it, and raise if it does.

    Raises:
        OSError: on the other ranks, whatever rank 0 raised.
    """
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            work()
        except Exception as caught:
            error = caught
    message = exchange(error and str(error))[0]
    if error is not None:
        raise error
    if message is not None:
        raise OSError(f"rank 0: {message}")


def fail(error: Exception) -> None:
    """Tell the other ranks, which are about to choose rows, that this one cannot."""
    if world_size() > 1:
        exchange((None, str(error)))


def choose_rows(layers: list[tuple[str, IdLoraLayer]], adapter: str, choose: Choose) -> None:
    """Have each layer's rows chosen on one rank; index, router, fingerprint and row scales are brought to all.

    Ranks whose weights are on the meta device receive only. If the ranks hold different layers (pipeline stages; their
    names or fingerprints differ), each chooses its own.

    Raises:
        ValueError, TypeError: on every rank, if one rank cannot choose.
    """
    rank, world = dist.get_rank(), world_size()
    order = sorted(layers, key=lambda item: -item[1].in_features * item[1].out_features)
    everyone = exchange(({name: _known(layer, adapter) for name, layer in order}, None))
    _raise_first(everyone, None)
    present = [layers for layers, _ in everyone]
    shared = all(list(others) == list(present[0]) for others in present) and all(
        len({others[name] for others in present} - {None}) <= 1 for name in present[0]
    )
    if not shared:
        present = [present[rank] if r == rank else {} for r in range(world)]

    chosen: dict[str, tuple[Tensor, ...]] = {}
    error: Exception | None = None
    for start in range(0, len(order), world):
        mine = []
        # A sharded weight takes all ranks to read: first those of as many layers as there are ranks, then all cluster.
        for i, (name, layer) in enumerate(order[start : start + world], start):
            owners = [r for r in range(world) if present[r].get(name)]
            own = bool(owners) and owners[i % len(owners)] == rank
            try:
                if own or is_sharded(stored(layer.get_base_layer())):
                    weight = layer.get_base_weight()
                    mine += [(name, layer, weight)] if own else []
            except Exception as caught:
                error = error or caught
        for name, layer, weight in mine:
            try:
                if error is None:
                    choose(name, layer, weight)
                    chosen[name] = tuple(_tensors(layer, adapter))
            except Exception as caught:
                error = caught
    everyone = exchange((chosen, error and str(error)))
    _raise_first(everyone, error)
    if not shared:
        for _, layer in layers:
            layer.on_this_rank_only = True
        return
    received = {name: tensors for others, _ in everyone for name, tensors in others.items()}
    for name, layer in layers:
        if name in received:
            _receive(layer, adapter, *received[name])


def _raise_first(everyone: list[tuple[Any, str | None]], own: Exception | None) -> None:
    if own is not None:
        raise own
    for rank, (_, message) in enumerate(everyone):
        if message is not None:
            raise ValueError(f"rank {rank} could not choose rows, so no rank has the adapter: {message}")


def _known(layer: IdLoraLayer, adapter: str) -> tuple[int, ...] | None:
    """What layer this is, or None if its weight is on the meta device."""
    return None if stored(layer.get_base_layer()).is_meta else tuple(layer.idlora_fingerprint[adapter].tolist())


def _tensors(layer: IdLoraLayer, adapter: str) -> list[Tensor]:
    holders: tuple[Any, ...] = (layer.idlora_index, layer.idlora_router, layer.idlora_fingerprint)
    holders += (layer.idlora_row_scale,) if adapter in layer.idlora_row_scale else ()
    return [holder[adapter].detach().cpu() for holder in holders]


def _receive(
    layer: IdLoraLayer, adapter: str, index: Tensor, router: Tensor, fingerprint: Tensor, *scale: Tensor
) -> None:
    weight = stored(layer.get_base_layer())
    device = "cpu" if weight.is_meta else weight.device
    layer.idlora_index[adapter] = index.to(device)
    layer.idlora_fingerprint[adapter] = fingerprint.to(device)
    for row_scale in scale:
        layer.idlora_row_scale[adapter] = row_scale.to(device)
    if adapter in layer.idlora_mean:
        layer.idlora_mean[adapter] = torch.zeros_like(layer.idlora_mean[adapter], device=device)
    if layer.idlora_B[adapter].is_meta:
        B = torch.zeros(layer.idlora_B[adapter].shape, dtype=layer.idlora_B[adapter].dtype)
        layer.idlora_B[adapter] = nn.Parameter(B, requires_grad=layer.idlora_B[adapter].requires_grad)
    layer.idlora_router[adapter] = nn.Parameter(
        router.to(device), requires_grad=layer.idlora_router[adapter].requires_grad
    )
    layer.pending.discard(adapter)


# ---- column-parallel layers ------------------------------------------------------------------------------------------


def local(tensor: Tensor | None) -> Tensor | None:
    """This rank's part of a bias; a bias that is not sharded as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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
                pieces.append(ops.shared_gemm(y0[..., here], z_j.contiguous(), piece, added, scaling))
        return torch.cat(pieces, -1)


def token_sums(y0: Tensor, columns: Columns | None, d: int, mask: Tensor | None = None) -> Tensor:
    """``sum_n y0_n`` and the number of tokens, ``[2, d]``; zeros in columns that this rank does not have.

    Of an output ``[batch, length, d]`` tokens that ``mask [batch, length]`` masks do not count.
    """
    first, last = (0, d) if columns is None else (columns.first, columns.last)
    sums = torch.zeros(2, d, dtype=accumulate(y0.dtype), device=y0.device)
    count: Tensor | int = y0.numel() // y0.shape[-1]
    if mask is not None and mask.shape == y0.shape[:-1]:
        kept = mask.to(y0.device).bool()
        y0, count = torch.where(kept.unsqueeze(-1), y0, 0), kept.sum()  # what pads may be NaN
    sums[0, first:last] = y0.flatten(0, -2).sum(0, dtype=sums.dtype)
    sums[1, first:last] = count
    return sums


def mean_over_tokens(y0: Tensor, columns: Columns | None, d: int, mask: Tensor | None = None) -> Tensor:
    """``1/N sum_n y0_n [d]`` over the tokens of all ranks that are not masked; each rank must call this."""
    sums = token_sums(y0, columns, d, mask)
    if world_size() > 1:
        dist.all_reduce(sums)
    return sums[0] / sums[1].clamp_min(1)


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
