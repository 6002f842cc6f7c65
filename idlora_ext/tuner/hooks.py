"""What an adapted model does before each call, and how that is taken off again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .names import adapted_layers


def _no_such_keyword(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("adapter_names") is not None:
        raise TypeError(
            f"{type(model).__name__} has no argument adapter_names, and might ignore it. "
            "Use `with idlora_ext.adapter_names(model, [...]): model(...)`, or wrap the model with get_peft_model."
        )


def refuse_adapter_names(model: nn.Module) -> None:
    """Have an adapted model that is not in a ``PeftModel`` refuse ``adapter_names``: transformers models that take
    ``**kwargs`` would ignore it. ``generate`` refuses keywords it does not know by itself.
    """
    allow_adapter_names(model)
    model.register_forward_pre_hook(_no_such_keyword, with_kwargs=True)


def allow_adapter_names(model: nn.Module) -> None:
    """Take the hook of :func:`refuse_adapter_names` off again."""
    remove_forward_pre_hook(model, _no_such_keyword)


def remove_forward_pre_hook(model: nn.Module, function: Callable[..., Any]) -> None:
    """Without the handle, which no copy of a model has. Relies on how torch keeps hooks."""
    for key in [key for key, hook in model._forward_pre_hooks.items() if hook is function]:
        del model._forward_pre_hooks[key]
        model._forward_pre_hooks_with_kwargs.pop(key, None)


def padding_mask(attention_mask: Any) -> Tensor | None:
    """A mask ``[batch, length]``; None for one of another form, which says more than which tokens pad a row."""
    return attention_mask if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 else None


class PaddingWatch:
    """Hands the ``attention_mask`` of a model's call to those of its layers that take their mean in it.

    A layer sees hidden states only. The mask stays there until the mean is taken, since with gradient checkpointing
    that is in the backward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = [*adapted_layers(model).values()]
        names = list(inspect.signature(model.forward).parameters)
        self.position = names.index("attention_mask") if "attention_mask" in names else None

    def note(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        mask = kwargs.get("attention_mask")
        if mask is None and self.position is not None and self.position < len(args):
            mask = args[self.position]
        mask = padding_mask(mask)
        for layer in self.layers:
            if not all(adapter.mean_taken for adapter in layer.idlora_adapter.values()):
                layer.padding_mask = mask


_WATCH = "_idlora_padding_watch"


def watch_padding(model: nn.Module) -> None:
    """Note the mask of every call of ``model`` from now on, for the layers it has now."""
    forget_padding(model)
    setattr(model, _WATCH, PaddingWatch(model))
    model.register_forward_pre_hook(note_padding, with_kwargs=True)


def note_padding(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Before a call of ``model``: its hook, and what PEFT's tuner does, which calls ``forward`` past all hooks."""
    watch: PaddingWatch | None = getattr(model, _WATCH, None)
    if watch is not None:
        watch.note(args, kwargs)


def forget_padding(model: nn.Module) -> None:
    """Undo :func:`watch_padding`."""
    vars(model).pop(_WATCH, None)
    remove_forward_pre_hook(model, note_padding)


def take_hooks_off(model: nn.Module) -> None:
    """What an adapted model does before each call, a model without adapters does not."""
    allow_adapter_names(model)
    forget_padding(model)
