"""``center``: the products with the chosen rows, less what they are on average over tokens.

``x_i = (y0 - m)[index_i]``, ``m [d]`` the mean of the base output ``y0`` over the tokens of a calibration. The hidden
states of language models have a large part that all tokens share, and in some layers nearly all of ``x`` is the product
with it: there the update is first of all a constant added to ``y``, and a rate small enough for that one direction is
too small for those that tell tokens apart. Centred products have only these. ``m`` is fixed, so nothing is added to
what is trained, and gathering already subtracts a vector where a layer's bias is in ``y0``: it costs nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..base import sharding
from ..layer import centering
from ..layer.layer import IdLoraLayer
from ..tuner.hooks import padding_mask
from ..tuner.names import brief


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
        name: m for name, m in model.named_modules() if isinstance(m, IdLoraLayer) and adapter_name in m.idlora_mean
    }
    if not layers:
        raise ValueError(f"calibrate: the model has no ID-LoRA adapter {adapter_name!r} with center=True")
    if trained := [name for name, layer in layers.items() if layer.idlora_B[adapter_name].any()]:
        raise ValueError(
            f"calibrate: adapter {adapter_name!r} is trained already, and another mean would change what it computes: "
            + ", ".join(brief(trained))
        )
    sums: dict[str, Tensor] = {}  # float64 [2, d]: of y0 over tokens, and of tokens
    mask: Tensor | None = None

    def observe(name: str, y0: Tensor) -> None:
        layer = layers[name]
        of_batch = centering.token_sums(y0, layer._columns(y0), layer.out_features, mask)
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
        layer.idlora_mean[adapter_name].copy_(total / count.clamp_min(1))
        layer.centered[adapter_name] = True
    if unseen:
        warnings.warn(f"calibrate: no token reached these layers, which are not centred: {', '.join(brief(unseen))}",
                      stacklevel=2)  # fmt: skip
