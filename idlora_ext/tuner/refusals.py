"""What the tuner refuses of a model before it changes anything, and how it names layers when it does."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from peft import PeftConfig
from torch import nn

from ..base import sharding
from ..base.experts import UnfusedExperts
from ..base.peft_internals import BaseTunerLayer, ExcludedModule, check_target_module_exists
from ..base.weight import is_linear
from ..layer.config import IdLoraConfig
from ..layer.layer import IdLoraLayer
from ..layer.merging import MergeableLayer, _new, merged_tensors, refuse
from .names import brief


def refuse_foreign_layers(config: PeftConfig, model: nn.Module) -> None:
    if str(config.target_modules).lower() != "all-linear":
        return  # a layer that is named is refused as such
    foreign = [
        name
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
        and not isinstance(module, IdLoraLayer)
        and not isinstance(check_target_module_exists(config, name), ExcludedModule)
    ]
    if foreign:
        raise ValueError(
            'target_modules="all-linear" takes in layers that another tuner has adapted: '
            + ", ".join(brief(foreign))
            + ". Name other layers in target_modules, these in exclude_modules, or remove that adapter (unload) first."
        )


def refuse_existing(model: nn.Module, adapter_name: str) -> None:
    other = vars(model).get("peft_config", {}).get(adapter_name)
    if other is not None and not isinstance(other, IdLoraConfig):
        raise ValueError(
            f"the model already has an adapter {adapter_name!r}, of the method {other.peft_type.value}, whose "
            "configuration would be lost. Give the new one another adapter_name."
        )
    for name, module in model.named_modules():
        if isinstance(module, IdLoraLayer) and adapter_name in module.idlora_B:
            raise ValueError(
                f"the model already has an ID-LoRA adapter {adapter_name!r} (first at layer {name!r}). Give the new "
                f"one another adapter_name, or remove it first: idlora_ext.remove(model, {adapter_name!r})."
            )


def unsupported(target: nn.Module, parent: nn.Module, dropout: float) -> str | None:
    """Why a target cannot be adapted, or None."""
    if isinstance(target, BaseTunerLayer) and not isinstance(target, IdLoraLayer):
        return f"already adapted by {type(target).__module__}.{type(target).__qualname__}"
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weights without calling it"
    if isinstance(target, UnfusedExperts):
        return f"{type(target.base_layer).__qualname__}: name its parameters, such as down_proj, instead"
    if not isinstance(target, IdLoraLayer) and not is_linear(target):
        return type(target).__qualname__
    return sharding.unsupported(target.get_base_layer() if isinstance(target, IdLoraLayer) else target, dropout)


def check(model: nn.Module, adapter_names: Sequence[str] | None, safe_merge: bool) -> None:
    """Refuse a merge of all layers before the first one changes.

    Raises:
        TypeError: ``adapter_names`` is no list.
        ValueError: an adapter that no layer has, a weight that another module uses too, and :func:`refuse`.
    """
    if isinstance(adapter_names, str):
        raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
    layers = list(mergeable(model))
    known = {name for layer in layers for name in layer.idlora_B}
    if unknown := [name for name in adapter_names or () if name not in known]:
        raise ValueError(f"there is no adapter {', '.join(map(repr, unknown))} to merge; the model has {sorted(known)}")
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    merging = [(layer, adapters) for layer in layers if (adapters := _new(layer, adapter_names))]
    gaining = []
    for layer, adapters in merging:
        refuse(layer, adapters)
        if len(names := owners.get(id(layer.get_base_layer().weight), [])) > 1:
            raise ValueError(
                f"layer {layer.name!r} cannot be merged: its weight is that of {', '.join(names)}, and merging "
                "would change it for all. Untie them (tie_word_embeddings=False), or leave the layer out with "
                "exclude_modules."
            )
        centered = [layer.idlora_mean[adapter] for adapter in adapters if adapter in layer.idlora_mean]
        if layer.get_base_layer().bias is None and any(mean.any() for mean in centered):
            gaining.append(layer.name)
    if gaining:
        warnings.warn(
            f"{len(gaining)} layers get a bias, which a centred adapter needs and they do not have: "
            f"{', '.join(brief(gaining))}. A checkpoint of the merged model only loads with it where the architecture "
            "has such biases (Llama: config.attention_bias and config.mlp_bias).",
            stacklevel=3,
        )
    if safe_merge:
        for layer, adapters in merging:
            merged_tensors(layer, adapters, safe=True)


def mergeable(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, MergeableLayer))
