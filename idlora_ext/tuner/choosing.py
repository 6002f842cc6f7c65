"""The rows of all new layers of an adapter: chosen here, or shared out to the ranks and brought to all.

In several processes every rank says the same things in the same order, or the others would wait for ever::

    each rank   what I hold -> [exchange] -> choose my share -> [exchange] -> receive the rest
    a failure   fail(error) -> [exchange]                                     before it: every rank raises
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

from ..base.sharding import exchange, is_sharded, world_size
from ..base.weight import stored
from ..layer.config import IdLoraConfig
from ..layer.layer import IdLoraLayer

Layers = Sequence[tuple[str, IdLoraLayer]]
Choose = Callable[..., None]


def choose_rows(layers: Layers, adapter: str, config: IdLoraConfig, *, progress: bool) -> None:
    """Have the rows of an adapter chosen in all these layers.

    Raises:
        ValueError, TypeError: naming the layer whose weight gives none; in several processes on every rank.
    """
    several = world_size() > 1
    layers = [(name, layer) for name, layer in layers if several or not stored(layer.get_base_layer()).is_meta]
    bar = tqdm(layers, desc="Choosing rows", unit="layer", disable=None if progress else True)

    def choose(name: str, layer: IdLoraLayer, weight: Tensor | None = None) -> None:
        bar.set_postfix_str(name, refresh=False)
        try:
            layer.choose_rows(adapter, config, name, weight)
        except (ValueError, TypeError) as error:
            raise type(error)(f"layer {name!r}: {error}. To leave the layer out, use exclude_modules.") from error
        bar.update()

    with bar:
        if several:
            _share(layers, adapter, choose)
        else:
            for name, layer in layers:
                choose(name, layer)


def fail(error: Exception) -> None:
    """Tell the other ranks, which are about to choose rows, that this one cannot."""
    if world_size() > 1:
        exchange((None, str(error)))


def _share(layers: Layers, adapter: str, choose: Choose) -> None:
    """Have each layer's rows chosen on one rank; all tensors but ``B`` are brought to all.

    Ranks whose weights are on the meta device receive only. If the ranks hold different layers (pipeline stages; their
    names or fingerprints differ), each chooses its own.
    """
    order = sorted(layers, key=lambda item: -item[1].in_features * item[1].out_features)
    held = _all_or_none(({name: _known(layer, adapter) for name, layer in order}, None))
    shared = _same_layers(held)
    chosen, error = _choose_mine(order, adapter, choose, _owners(order, held, shared))
    everyone = _all_or_none((chosen, None if error is None else str(error)), error)
    received = {name: tensors for others in everyone for name, tensors in others.items()}
    for name, layer in layers:
        layer.on_this_rank_only = not shared
        if shared and name in received:
            weight = stored(layer.get_base_layer())
            layer.idlora_adapter[adapter].receive(received[name], "cpu" if weight.is_meta else weight.device)


def _all_or_none(mine: tuple[Any, str | None], error: Exception | None = None) -> list[Any]:
    """What all ranks have, by rank; if one of them has an error instead, every rank raises."""
    everyone = exchange(mine)
    if error is not None:
        raise error
    for rank, (_, message) in enumerate(everyone):
        if message is not None:
            raise ValueError(f"rank {rank} could not choose rows, so no rank has the adapter: {message}")
    return [value for value, _ in everyone]


def _known(layer: IdLoraLayer, adapter: str) -> tuple[int, ...] | None:
    """What layer this is, or None if its weight is on the meta device."""
    if stored(layer.get_base_layer()).is_meta:
        return None
    return tuple(layer.idlora_adapter[adapter].fingerprint.tolist())


def _same_layers(held: list[dict[str, Any]]) -> bool:
    names = list(held[0])
    return all(list(others) == names for others in held) and all(
        len({others[name] for others in held} - {None}) <= 1 for name in names
    )


def _owners(order: Layers, held: list[dict[str, Any]], shared: bool) -> dict[str, int | None]:
    """The rank that chooses each layer's rows: those that hold its weight, in turn; None if none does."""
    owners: dict[str, int | None] = {}
    for i, (name, _) in enumerate(order):
        candidates = [r for r, layers in enumerate(held) if layers.get(name) and (shared or r == dist.get_rank())]
        owners[name] = candidates[i % len(candidates)] if candidates else None
    return owners


def _choose_mine(
    order: Layers, adapter: str, choose: Choose, owners: dict[str, int | None]
) -> tuple[dict[str, dict[str, Tensor]], Exception | None]:
    """Choose the rows of this rank's layers: what was chosen, and the first error, after which nothing is chosen."""
    chosen: dict[str, dict[str, Tensor]] = {}
    error: Exception | None = None
    for start in range(0, len(order), world_size()):
        mine = []
        # A sharded weight takes all ranks to read: first those of as many layers as there are ranks, then all choose.
        for name, layer in order[start : start + world_size()]:
            own = owners[name] == dist.get_rank()
            try:
                if own or is_sharded(stored(layer.get_base_layer())):
                    weight = layer.get_base_weight()
                    mine += [(name, layer, weight)] if own else []
            except Exception as caught:
                error = error or caught
        for name, layer, weight in mine if error is None else ():
            try:
                choose(name, layer, weight)
                chosen[name] = layer.idlora_adapter[adapter].chosen()
            except Exception as caught:
                error = caught
                break
    return chosen, error
