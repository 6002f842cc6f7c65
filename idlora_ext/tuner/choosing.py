"""The rows of all new layers of a model: chosen on one rank, or shared out to the ranks and brought to all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if dist.is_available():
    from torch.distributed.tensor import DTensor
else:  # a build of torch without it: then nothing is ever sharded
    DTensor = type("DTensor", (), {})  # type: ignore[assignment, misc]
from ..base.sharding import exchange, is_sharded, world_size
from ..base.weight import stored
from ..layer.layer import IdLoraLayer

Choose = Callable[[str, "IdLoraLayer", Tensor], None]


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
