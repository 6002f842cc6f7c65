"""What other libraries are taught: all that importing this package changes outside of it.

Each patch replaces one function by one that asks whether ID-LoRA is concerned, and does what it always did if not. The
docstrings say what would retire them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import peft.mixed_model
import peft.utils.hotswap
import torch
import torch.distributed as dist
import transformers
from accelerate.utils import fsdp_utils
from peft import PeftConfig, PeftType
from torch import nn

from .layer.adapter import Adapter
from .lifecycle.checkpoint import load, loadable_in_place


def wrap_once(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace ``owner.name`` by ``wrapper(original, ...)``; a second import of the package changes nothing."""
    original = getattr(owner, name)
    if hasattr(original, "_idlora"):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    wrapped._idlora = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def patch() -> None:
    """Put all patches in place."""
    wrap_once(transformers.Trainer, "_load_from_checkpoint", resume)
    wrap_once(transformers.Trainer, "_load_best_model", load_best)
    wrap_once(fsdp_utils, "fsdp2_load_full_state_dict", load_full_state_dict)
    wrap_once(peft.mixed_model, "_check_config_compatible", refuse_mixed_model)
    wrap_once(peft.utils.hotswap, "check_hotswap_configs_compatible", refuse_hotswap)


def resume(
    original: Callable[..., Any], trainer: Any, resume_from_checkpoint: str, model: nn.Module | None = None
) -> None:
    """Let ``Trainer`` resume from a checkpoint of an injected ID-LoRA adapter.

    ``Trainer`` writes such checkpoints (adapter only), but reads adapters back for ``PeftModel`` alone, and stops with
    a missing-file error for those of ``add_adapter``. Retired when ``Trainer._load_from_checkpoint`` reads what
    ``Trainer._save`` writes for a model with ``_hf_peft_config_loaded``.
    """
    target: Any = trainer.model if model is None else model
    if not loadable_in_place(target, resume_from_checkpoint):
        return original(trainer, resume_from_checkpoint, model)
    load(target, resume_from_checkpoint, adapter_name=target.active_adapters()[0], is_trainable=True)


def load_best(original: Callable[..., Any], trainer: Any) -> None:
    """Let ``Trainer`` end with the best checkpoint of an injected ID-LoRA adapter; retired with :func:`resume`."""
    checkpoint = trainer.state.best_model_checkpoint
    if not loadable_in_place(trainer.model, checkpoint):
        return original(trainer)
    load(trainer.model, checkpoint, adapter_name=trainer.model.active_adapters()[0], is_trainable=True)


def load_full_state_dict(
    original: Callable[..., Any], accelerator: Any, model: nn.Module, full_sd: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """Let accelerate shard ID-LoRA layers with FSDP2 and ``cpu_ram_efficient_loading``.

    ``fsdp2_load_full_state_dict`` sends rank 0's tensors into a model on the meta device. It takes every entry of
    ``model.state_dict()`` for a sharded parameter and fails at persistent buffers. An adapter's are kept from it, and
    sent here. ``fsdp2_prepare_model`` calls it by its name. Retired when accelerate sends persistent buffers.
    """
    adapters = {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}
    for adapter in adapters.values():
        adapter._non_persistent_buffers_set.update(adapter._buffers)
    try:
        loaded = original(accelerator, model, full_sd, *args, **kwargs)
    finally:
        for adapter in adapters.values():
            adapter._non_persistent_buffers_set.clear()
    for name, adapter in adapters.items():
        for kind, buffer in adapter.named_buffers():
            sent = full_sd[f"{name}.{kind}"] if accelerator.is_main_process else buffer
            received = torch.empty_like(sent, device=accelerator.device)
            if accelerator.is_main_process:
                received.copy_(sent)
            dist.broadcast(received, src=0)
            setattr(adapter, kind, received)
    return loaded


def refuse_mixed_model(original: Callable[..., Any], *configs: PeftConfig) -> None:
    """Name the way out where PEFT refuses what only LoRA can do: mixed tuner types.

    ``PeftMixedModel`` asks ``_check_config_compatible(peft_config)`` before it changes anything, by its name in the
    module. Retired when PEFT lets a tuner say it.
    """
    _refuse(
        configs,
        "PeftMixedModel does not take ID-LoRA. Several ID-LoRA adapters can be active at once: "
        "get_peft_model without mixed=True, then model.base_model.set_adapter([...]). Beside an adapter of another "
        "method on other layers, use idlora_ext.apply or inject_adapter_in_model.",
    )
    original(*configs)


def refuse_hotswap(original: Callable[..., Any], *configs: PeftConfig) -> None:
    """The same for ``hotswap_adapter``, which asks ``check_hotswap_configs_compatible(config0, config1)``."""
    _refuse(
        configs,
        "hotswap_adapter takes LoRA only. idlora_ext.load(model, directory, adapter_name) replaces the tensors of an "
        "ID-LoRA adapter in place.",
    )
    original(*configs)


def _refuse(configs: tuple[PeftConfig, ...], way_out: str) -> None:
    if any(config.peft_type == PeftType.IDLORA for config in configs):
        raise ValueError(way_out)
