"""Putting a model back: after a failure exactly as it was, and what :func:`idlora_ext.remove` has to know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..base.experts import UnfusedExperts
from ..base.peft_internals import BaseTunerLayer
from ..layer.layer import IdLoraLayer
from .hooks import take_hooks_off


def fuse(model: nn.Module) -> None:
    """Put the original modules back wherever no adapter is left in the experts."""
    for name, module in list(model.named_modules()):
        if isinstance(module, UnfusedExperts) and not any(isinstance(m, BaseTunerLayer) for m in module.modules()):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base_layer)


TRAINABLE = "_idlora_trainable"  # on an adapted model: names of the parameters that were trainable before


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


@contextmanager
def restored_on_failure(model: nn.Module) -> Iterator[ModelState]:
    """Whatever fails inside, an interrupt too, the model is what it was."""
    before = ModelState(model)
    try:
        yield before
    except BaseException:
        before.restore()
        raise


_ATTRIBUTES = ("peft_config", "_hf_peft_config_loaded", "_load_pretrained_model", TRAINABLE)


def remember_trainable(model: nn.Module) -> None:
    """Note, at the first adapter, which parameters were trainable: PEFT freezes them all."""
    if not hasattr(model, TRAINABLE):
        setattr(model, TRAINABLE, [name for name, p in model.named_parameters() if p.requires_grad])
