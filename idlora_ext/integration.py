"""Every touch on the internals of PEFT and transformers that is not part of their documented interface.

Tested with PEFT 0.21 and transformers 5.23. Each function says what it relies on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import transformers
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

if TYPE_CHECKING:
    from .restore import ModelState


def extend_peft_type() -> None:
    """Add ``PeftType.IDLORA``: PEFT has no door for third-party methods, its registry only accepts enum members.

    Relies on the standard library's Enum keeping its members in ``_member_map_`` and ``_value2member_map_``.
    """
    if "IDLORA" in PeftType.__members__:
        return
    member = str.__new__(PeftType, "IDLORA")
    member._name_ = "IDLORA"
    member._value_ = "IDLORA"
    PeftType._member_names_.append("IDLORA")
    PeftType._member_map_["IDLORA"] = member
    PeftType._value2member_map_["IDLORA"] = member
    type.__setattr__(PeftType, "IDLORA", member)


extend_peft_type()


def registered_methods() -> list[str]:
    """Names of the methods PEFT knows: importing a module a second time must not register a method again."""
    return [method.value for method in PEFT_TYPE_TO_TUNER_MAPPING]


def verify_transformers_load(model: nn.Module, before: ModelState, verify: Callable[[dict[str, Any]], None]) -> None:
    """Have the next loading of tensors into ``model`` checked, and undone if they do not fit.

    ``PreTrainedModel.load_adapter`` injects the adapter, then calls ``self._load_pretrained_model(model=, state_dict=,
    checkpoint_files=, ...)``, and only logs tensors that are missing or unexpected. It has no hook in between, so this
    puts one on the instance; it removes itself when it is called.
    """
    loader = getattr(type(model), "_load_pretrained_model", None)
    if loader is None:
        return

    def checked(**arguments: Any) -> Any:
        from .checkpoint import read_tensors

        forget_transformers_load(model)
        try:
            tensors = arguments["state_dict"]
            if tensors is None:
                tensors = {key: t for file in arguments["checkpoint_files"] for key, t in read_tensors(file).items()}
            verify(tensors)
            return loader(**arguments)
        except BaseException:
            before.restore()
            raise

    vars(model)["_load_pretrained_model"] = checked


def forget_transformers_load(model: nn.Module) -> None:
    """Take the hook of :func:`verify_transformers_load` off again."""
    vars(model).pop("_load_pretrained_model", None)


def teach_trainer() -> None:
    """Let ``Trainer`` resume from, and end with the best of, checkpoints of an injected ID-LoRA adapter.

    ``Trainer`` writes such checkpoints (adapter only), but ``_load_from_checkpoint`` and ``_load_best_model`` read
    adapters back for ``PeftModel`` alone and stop with a missing-file error for adapters injected by ``add_adapter``.
    For models that hold ID-LoRA layers outside a ``PeftModel`` the two methods load the adapter; for all others they
    do what they always did.
    """
    from .checkpoint import load, loadable_in_place

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
    import torch
    from accelerate.utils import fsdp_utils
    from torch.distributed import broadcast

    from .layer import IdLoraLayer

    original = fsdp_utils.fsdp2_load_full_state_dict
    if hasattr(original, "_idlora"):
        return

    @functools.wraps(original)
    def load(accelerator: Any, model: nn.Module, full_sd: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        holders: dict[str, Any] = {
            f"{name}.{kind}": getattr(module, kind)
            for name, module in model.named_modules()
            if isinstance(module, IdLoraLayer)
            for kind in ("idlora_index", "idlora_fingerprint")
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
