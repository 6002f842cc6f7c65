"""``center``: the products with the chosen rows, less what they are on average over tokens.

``x_i = (y0 - m)[index_i]``, ``m [d]`` the mean of the base output ``y0`` over the tokens of a calibration. The hidden
states of language models have a large part that all tokens share, and in some layers nearly all of ``x`` is the product
with it: there the update is first of all a constant added to ``y``, and a rate small enough for that one direction is
too small for those that tell tokens apart. Centred products have only these. ``m`` is fixed, so nothing is added to
what is trained, and gathering already subtracts a vector where a layer's bias is in ``y0``: it costs nothing.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import distributed, integration
from .layer import IdLoraLayer
from .refusals import brief


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
        of_batch = distributed.token_sums(y0, layer._columns(y0), layer.out_features, mask)
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
    everyone = distributed.exchange(sums) if distributed.world_size() > 1 else [sums]
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


def padding_mask(attention_mask: Any) -> Tensor | None:
    """A mask ``[batch, length]``; None for one of another form, which says more than which tokens pad a row."""
    return attention_mask if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 else None


class PaddingWatch:
    """Hands the ``attention_mask`` of a model's call to those of its layers that take their mean in it.

    A layer sees hidden states only. The mask stays there until the mean is taken, since with gradient checkpointing
    that is in the backward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, IdLoraLayer)]
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
            if not all(layer.centered.values()):
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
    integration.remove_forward_pre_hook(model, note_padding)
