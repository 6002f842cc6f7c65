"""What other libraries are taught: all that importing this package changes outside of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import peft.mixed_model
import peft.utils.hotswap
import torch
import transformers
from accelerate.utils import fsdp_utils
from peft import PeftConfig, PeftType
from torch import nn
from torch.distributed import broadcast

from .layer.layer import IdLoraLayer
from .lifecycle.checkpoint import load, loadable_in_place


def teach_trainer() -> None:
    """Let ``Trainer`` resume from, and end with the best of, checkpoints of an injected ID-LoRA adapter.

    ``Trainer`` writes such checkpoints (adapter only), but ``_load_from_checkpoint`` and ``_load_best_model`` read
    adapters back for ``PeftModel`` alone and stop with a missing-file error for adapters injected by ``add_adapter``.
    For models that hold ID-LoRA layers outside a ``PeftModel`` the two methods load the adapter; for all others they
    do what they always did.
    """

    def resume(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def load_from_checkpoint(trainer: Any, resume_from_checkpoint: str, model: nn.Module | None = None) -> Any:
            target: Any = trainer.model if model is None else model
            if not loadable_in_place(target, resume_from_checkpoint):
                return original(trainer, resume_from_checkpoint, model)
            load(target, resume_from_checkpoint, adapter_name=target.active_adapters()[0], is_trainable=True)

        return load_from_checkpoint

    def best(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def load_best_model(trainer: Any) -> Any:
            checkpoint = trainer.state.best_model_checkpoint
            if not loadable_in_place(trainer.model, checkpoint):
                return original(trainer)
            load(trainer.model, checkpoint, adapter_name=trainer.model.active_adapters()[0], is_trainable=True)

        return load_best_model

    for name, wrap in (("_load_from_checkpoint", resume), ("_load_best_model", best)):
        method = getattr(transformers.Trainer, name)
        if not hasattr(method, "_idlora"):
            wrapped = wrap(method)
            wrapped._idlora = True  # type: ignore[attr-defined]
            setattr(transformers.Trainer, name, wrapped)


def teach_accelerate() -> None:
    """Let accelerate shard ID-LoRA layers with FSDP2 and ``cpu_ram_efficient_loading``.

    ``fsdp2_load_full_state_dict(accelerator, model, full_sd, ...)`` sends rank 0's tensors into a model on the meta
    device. It takes every entry of ``model.state_dict()`` for a sharded parameter and fails at persistent buffers. The
    index and the fingerprint are kept from it, and sent here. ``fsdp2_prepare_model`` calls it by its name.
    """

    original = fsdp_utils.fsdp2_load_full_state_dict
    if hasattr(original, "_idlora"):
        return

    @functools.wraps(original)
    def load(accelerator: Any, model: nn.Module, full_sd: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        holders: dict[str, Any] = {
            f"{name}.{kind}": getattr(module, kind)
            for name, module in model.named_modules()
            if isinstance(module, IdLoraLayer)
            for kind in ("idlora_index", "idlora_fingerprint", "idlora_row_scale", "idlora_mean")
        }
        for holder in holders.values():
            holder._non_persistent_buffers_set.update(holder.keys())
        try:
            loaded = original(accelerator, model, full_sd, *args, **kwargs)
        finally:
            for holder in holders.values():
                holder._non_persistent_buffers_set.clear()
        for name, holder in holders.items():
            for adapter, buffer in list(holder.items()):
                sent = full_sd[f"{name}.{adapter}"] if accelerator.is_main_process else buffer
                holder[adapter] = torch.empty_like(sent, device=accelerator.device)
                if accelerator.is_main_process:
                    holder[adapter].copy_(sent)
                broadcast(holder[adapter], src=0)
        return loaded

    load._idlora = True  # type: ignore[attr-defined]
    fsdp_utils.fsdp2_load_full_state_dict = load


def teach_refusals() -> None:
    """Let PEFT's refusals of what it has for LoRA only name the way out for ID-LoRA.

    Relies on ``PeftMixedModel`` asking ``_check_config_compatible(peft_config)``, and ``hotswap_adapter`` asking
    ``check_hotswap_configs_compatible(config0, config1)``, before they change anything, by their names in the module.
    """

    def refuse(module: Any, function: str, way_out: str) -> None:
        original = getattr(module, function)
        if hasattr(original, "_idlora"):
            return

        @functools.wraps(original)
        def check(*configs: PeftConfig) -> None:
            if any(config.peft_type == PeftType.IDLORA for config in configs):
                raise ValueError(way_out)
            original(*configs)

        check._idlora = True  # type: ignore[attr-defined]
        setattr(module, function, check)

    refuse(
        peft.mixed_model,
        "_check_config_compatible",
        "PeftMixedModel does not take ID-LoRA. Several ID-LoRA adapters can be active at once: "
        "get_peft_model without mixed=True, then model.base_model.set_adapter([...]). Beside an adapter of another "
        "method on other layers, use idlora_ext.apply or inject_adapter_in_model.",
    )
    refuse(
        peft.utils.hotswap,
        "check_hotswap_configs_compatible",
        "hotswap_adapter takes LoRA only. idlora_ext.load(model, directory, adapter_name) replaces the tensors of an "
        "ID-LoRA adapter in place.",
    )
