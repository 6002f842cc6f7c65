"""``calibrate``: the means of centred adapters, from batches that the user gives. What for: ``layer/centering.py``."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..base import sharding
from ..layer.centering import token_sums
from ..tuner.hooks import padding_mask
from ..tuner.names import adapted_layers, brief


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], adapter_name: str = "default", *, progress: bool = True
) -> None:
    """``m = 1/N sum_n y0_n`` for each layer of an adapter with ``center=True``, over the tokens of ``batches``.

    Without this call, ``m`` is taken from the first forward pass with gradients. Call it where that batch is not
    representative, and before training in several processes, whose batches differ: every rank calls it, with the
    same batches or its own, and all get the mean over all of them.

    Args:
        model: with an adapter that is not trained yet, on the device it is to run on.
        batches: arguments of ``model(**batch)``; some thousand tokens in all are plenty. Tokens that an
            ``attention_mask [batch, length]`` masks do not count, here as in a first batch, in layers that see
            ``[batch, length, ...]``.
        adapter_name: the adapter's.
        progress: show a bar.

    Raises:
        ValueError: the model has no such adapter, the adapter has no ``center=True`` or is trained already (another
            ``m`` would change what it computes), or no batch was given. Nothing is changed.
    """
    layers = {
        name: layer
        for name, layer in adapted_layers(model, adapter_name).items()
        if layer.idlora_adapter[adapter_name].mean is not None
    }
    if not layers:
        raise ValueError(f"calibrate: the model has no ID-LoRA adapter {adapter_name!r} with center=True")
    if trained := [name for name, layer in layers.items() if layer.idlora_adapter[adapter_name].B.any()]:
        raise ValueError(
            f"calibrate: adapter {adapter_name!r} is trained already, and another mean would change what it computes: "
            + ", ".join(brief(trained))
        )
    sums: dict[str, Tensor] = {}  # float64 [2, d]: of y0 over tokens, and of tokens
    mask: Tensor | None = None

    def observe(name: str, y0: Tensor) -> None:
        layer = layers[name]
        of_batch = token_sums(y0, layer.columns(y0), layer.out_features, mask)
        sums[name] = sums.get(name, 0) + of_batch.cpu().double()

    modes = [(module, module.training) for module in model.modules()]
    hooks = [
        layer.base_layer.register_forward_hook(lambda _, __, y0, name=name: observe(name, y0))
        for name, layer in layers.items()
    ]
    try:
        model.eval()
        for batch in tqdm(batches, desc="Calibrating", unit="batch", disable=None if progress else True):
            mask = padding_mask(batch.get("attention_mask"))
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    everyone = sharding.exchange(sums) if sharding.world_size() > 1 else [sums]
    if not any(everyone):
        raise ValueError("calibrate: at least one batch is needed, got none")
    unseen = []
    for name, layer in layers.items():
        nothing = torch.zeros(2, layer.out_features, dtype=torch.float64)
        total, count = sum((others[name] for others in everyone if name in others), nothing)
        unseen += [] if count.all() else [name]
        adapter = layer.idlora_adapter[adapter_name]
        adapter.mean.copy_(total / count.clamp_min(1))
        adapter.mean_taken = True
    if unseen:
        warnings.warn(f"calibrate: no token reached these layers, which are not centred: {', '.join(brief(unseen))}",
                      stacklevel=2)  # fmt: skip
