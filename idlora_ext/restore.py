"""Putting a model back: after a failure exactly as it was, after :func:`remove` as it was before the first adapter."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn

from . import centering, integration
from .experts import fuse
from .integration import AuxiliaryTrainingWrapper, BaseTunerLayer
from .layer import IdLoraLayer

_TRAINABLE = "_idlora_trainable"  # on an adapted model: names of the parameters that were trainable before


class ModelState:
    """Everything that injecting an adapter changes in a model, so that :meth:`restore` can undo it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.children = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
        self.requires_grad = [(p, p.requires_grad) for p in model.parameters()]
        self.adapters = [
            (m, m._all_available_adapter_names(), m.active_adapter, m.disable_adapters)
            for m in model.modules()
            if isinstance(m, IdLoraLayer)
        ]
        self.attributes = {name: vars(model)[name] for name in _ATTRIBUTES if name in vars(model)}
        self.configs = dict(vars(model).get("peft_config", {}))

    def restore(self) -> None:
        """Bring the model back to where it was when this object was made."""
        for layer, names, active, disabled in self.adapters:
            for name in set(layer._all_available_adapter_names()) - set(names):
                layer._active_adapter = [a for a in layer.active_adapters if a != name]  # or PEFT warns of a new choice
                layer.delete_adapter(name)
            layer._active_adapter = active
            layer._disable_adapters = disabled
        for parent, name, child in self.children:
            if parent._modules.get(name) is not child:
                setattr(parent, name, child)
        if not self.adapters:
            take_hooks_off(self.model)
        for name in _ATTRIBUTES:
            vars(self.model).pop(name, None)
        vars(self.model).update(self.attributes)
        if "peft_config" in self.attributes:
            configs = self.attributes["peft_config"]  # one dictionary, shared with PEFT's objects: refill it in place
            configs.clear()
            configs.update(self.configs)
        for parameter, requires_grad in self.requires_grad:
            parameter.requires_grad_(requires_grad)


_ATTRIBUTES = ("peft_config", "_hf_peft_config_loaded", "_load_pretrained_model", _TRAINABLE)


def take_hooks_off(model: nn.Module) -> None:
    """What an adapted model does before each call, a model without adapters does not."""
    integration.allow_adapter_names(model)
    centering.forget_padding(model)


def remember_trainable(model: nn.Module) -> None:
    """Note, at the first adapter, which parameters were trainable: PEFT freezes them all."""
    if not hasattr(model, _TRAINABLE):
        setattr(model, _TRAINABLE, [name for name, p in model.named_parameters() if p.requires_grad])


def remove(model: nn.Module, adapter_name: str | None = None) -> nn.Module:
    """Take ID-LoRA out of a model: the original module objects return, and with them every output, bit for bit.

    Parameters that were trainable before the first adapter are trainable again.

    Args:
        model: what :func:`idlora_ext.apply`, ``add_adapter`` or ``get_peft_model`` made.
        adapter_name: one adapter to remove; by default all of them.

    Returns:
        The base model: the object that was given, or what a ``PeftModel`` was wrapped around.

    Raises:
        ValueError: the model has no such adapter (nothing is changed).
    """
    base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = [(name, m) for name, m in base.named_modules() if isinstance(m, IdLoraLayer)]
    present = sorted({a for _, layer in layers for a in layer._all_available_adapter_names()})
    if not present or (adapter_name is not None and adapter_name not in present):
        wanted = "ID-LoRA adapter" if adapter_name is None else f"ID-LoRA adapter {adapter_name!r}"
        raise ValueError(f"remove: the model has no {wanted}; it has {present or 'none'}")
    doomed = present if adapter_name is None else [adapter_name]
    left = [a for a in present if a not in doomed]

    wrappers = [(n, m) for n, m in base.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    for name in doomed:
        for _, module in layers + wrappers:
            active = [a for a in module.active_adapters if a not in doomed]
            module._active_adapter = active or left[:1]
            module.delete_adapter(name, *([active] if isinstance(module, AuxiliaryTrainingWrapper) else []))
    integration.forget_transformers_load(base)
    configs: dict[str, Any] = vars(base).get("peft_config", {})
    for name in doomed:
        configs.pop(name, None)

    for path, module in layers + wrappers:
        original = module.base_layer if isinstance(module, BaseTunerLayer) else module.original_module
        remaining = module._all_available_adapter_names() if isinstance(module, IdLoraLayer) else module._adapters
        if not remaining:
            parent, _, child = path.rpartition(".")
            setattr(base.get_submodule(parent), child, original)
    fuse(base)
    if not configs:
        take_hooks_off(base)
        for name in ("peft_config", "_hf_peft_config_loaded"):
            vars(base).pop(name, None)
        trainable = set(vars(base).pop(_TRAINABLE, ()))
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name in trainable)
    return base
