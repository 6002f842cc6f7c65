"""``remove``: the model as it was before the first adapter."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn

from ..base.peft_internals import AuxiliaryTrainingWrapper, BaseTunerLayer
from ..layer.layer import IdLoraLayer
from ..tuner.hooks import take_hooks_off
from ..tuner.restore import TRAINABLE, fuse
from ..tuner.verify import forget_transformers_load


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
    forget_transformers_load(base)
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
        trainable = set(vars(base).pop(TRAINABLE, ()))
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name in trainable)
    return base
