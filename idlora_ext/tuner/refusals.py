"""What the tuner refuses of a model before it changes anything, naming the layers and the way out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from peft import PeftConfig
from torch import nn

from ..base import sharding
from ..base.experts import UnfusedExperts
from ..base.peft_internals import BaseTunerLayer, ExcludedModule, check_target_module_exists
from ..base.weight import is_linear
from ..layer.config import IdLoraConfig
from ..layer.layer import IdLoraLayer
from ..layer.merging import MergeableLayer, merged_tensors, not_merged, refuse_merge
from .names import adapted_layers, brief


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


def refuse_name(model: nn.Module, adapter_name: str) -> None:
    """Refuse a name for a new adapter: one that is taken, or that no module can have."""
    other = vars(model).get("peft_config", {}).get(adapter_name)
    if other is not None and not isinstance(other, IdLoraConfig):
        raise ValueError(
            f"the model already has an adapter {adapter_name!r}, of the method {other.peft_type.value}, whose "
            "configuration would be lost. Give the new one another adapter_name."
        )
    for name in adapted_layers(model, adapter_name):
        raise ValueError(
            f"the model already has an ID-LoRA adapter {adapter_name!r} (first at layer {name!r}). Give the new "
            f"one another adapter_name, or remove it first: idlora_ext.remove(model, {adapter_name!r})."
        )
    if "." in adapter_name or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(
            f"an adapter cannot be called {adapter_name!r}: it is a module of that name in every layer, and torch does "
            "not allow dots there, nor names of its own. Take another adapter_name."
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


def refuse_merge_of_model(model: nn.Module, adapter_names: Sequence[str] | None, safe_merge: bool) -> None:
    """Refuse a merge of all layers before the first one changes.

    Raises:
        TypeError: ``adapter_names`` is no list.
        ValueError: an adapter that no layer has, a weight that another module uses too, a layer that cannot be merged
            (:func:`idlora_ext.layer.merging.refuse_merge`).
    """
    if isinstance(adapter_names, str):
        raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
    layers = [module for module in model.modules() if isinstance(module, MergeableLayer)]
    known = {name for layer in layers for name in layer.idlora_adapter}
    if unknown := [name for name in adapter_names or () if name not in known]:
        raise ValueError(f"there is no adapter {', '.join(map(repr, unknown))} to merge; the model has {sorted(known)}")
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    merging = [(layer, names) for layer in layers if (names := not_merged(layer, adapter_names))]
    gaining = []
    for layer, names in merging:
        refuse_merge(layer, names)
        base = layer.get_base_layer()
        if len(users := owners.get(id(base.weight), [])) > 1:
            raise ValueError(
                f"layer {layer.name!r} cannot be merged: its weight is that of {', '.join(users)}, and merging "
                "would change it for all. Untie them (tie_word_embeddings=False), or leave the layer out with "
                "exclude_modules."
            )
        means = [layer.idlora_adapter[name].mean for name in names]
        if base.bias is None and any(mean is not None and mean.any() for mean in means):
            gaining.append(layer.name)
    if gaining:
        warnings.warn(
            f"{len(gaining)} layers get a bias, which a centred adapter needs and they do not have: "
            f"{', '.join(brief(gaining))}. A checkpoint of the merged model only loads with it where the architecture "
            "has such biases (Llama: config.attention_bias and config.mlp_bias).",
            stacklevel=3,
        )
    if safe_merge:
        for layer, names in merging:
            merged_tensors(layer, names, safe=True)
