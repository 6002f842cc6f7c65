"""Every touch on the internals of PEFT and transformers that is not part of their documented interface.

The range that is tested is in ``tested_versions.py``. Each import and each function says what it relies on.

:class:`idlora_ext.model.IdLoraModel` overrides these methods of ``BaseTuner``, which are where it is called from:

==========================================  ===========================================================================
``inject_adapter``                          called once for each adapter, which ``peft_config`` already holds
``_prepare_model``                          called by it before "all-linear" is resolved and the modules are listed
``_create_and_replace``                     called for every targeted module, and for nothing inside an adapted layer
``_check_target_module_exists``             asked for every module; an ``_ExcludedModule`` is one that was excluded
``_replace_module``                         called to put a layer in, and by ``unload`` to put its base layer back
``_enable_peft_forward_hooks``              entered by ``PeftModel`` around ``forward`` and ``generate``, with their
                                            arguments
``_check_merge_allowed``                    called before any layer is merged
``_unload_and_optionally_merge``            all of ``unload`` and ``merge_and_unload``
``_get_adapter_state_dict``                 called for what is saved (since PEFT 0.21)
``_remove_adapter_name_from_key``           gives a tensor's name in the file; loading inverts it (0.21)
``_remap_adapter_state_dict_for_load``      called with a file's tensors before any is copied (0.21)
==========================================  ===========================================================================

:class:`idlora_ext.layer.IdLoraLayer` relies on ``BaseTunerLayer`` treating every dictionary named in
``adapter_layer_names`` and ``other_param_names`` by adapter name: deleting, freezing and moving go through them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import peft.mixed_model
import peft.utils.hotswap
import transformers
from peft import PeftConfig, PeftType

# The registry that register_peft_method fills, by PeftType.
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

# Like nn.ParameterDict, for buffers: indexing, deleting, `in`, names in the state dict, moving with the module.
from peft.tuners._buffer_dict import BufferDict as BufferDict

# What PEFT's documentation has new methods derive from.
from peft.tuners.tuners_utils import BaseTuner as BaseTuner
from peft.tuners.tuners_utils import BaseTunerLayer as BaseTunerLayer

# The false value with which check_target_module_exists tells "excluded" from "not targeted".
from peft.tuners.tuners_utils import _ExcludedModule as ExcludedModule  # noqa: F401

# Resolves "all-linear" to names, in the configuration itself.
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

# Which of the adapters to merge, with PEFT's warnings of those that are merged already.
from peft.tuners.tuners_utils import check_adapters_to_merge as check_adapters_to_merge

# PEFT's targeting: names or pattern, exclude_modules, layers_to_transform.
from peft.tuners.tuners_utils import check_target_module_exists as check_target_module_exists

# What modules_to_save puts around a module: `original_module`, `_adapters`, `_active_adapter`, `delete_adapter`.
from peft.utils.other import AuxiliaryTrainingWrapper as AuxiliaryTrainingWrapper

# The first key of a pattern dictionary that a layer's name ends with, else the name itself.
from peft.utils.other import get_pattern_key as get_pattern_key

# Reading (and, for merging, writing) the weights of quantised layers.
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend as ForwardOnlyQuantizationBackend
from peft.utils.quantization_utils import QuantizationBackend as QuantizationBackend
from peft.utils.quantization_utils import get_quantization_kwargs as get_quantization_kwargs
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from .mixed_batches import MixedBatch
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


def repeated_rows(arguments: dict[str, Any]) -> int:
    """How often ``generate``, called with these arguments, repeats every row of its batch: for beams and samples.

    As ``GenerationMixin.generate`` has it. PEFT looks at the argument ``num_beams`` alone.
    """
    config = arguments.get("generation_config")
    given = (arguments.get(n) or getattr(config, n, None) or 1 for n in ("num_beams", "num_return_sequences"))
    return max(given)


@contextlib.contextmanager
def mixed_saved_modules(model: nn.Module, batch: MixedBatch) -> Iterator[None]:
    """Have modules that are trained in full (``modules_to_save``) run every row with the copy of its adapter.

    Relies on ``AuxiliaryTrainingWrapper.forward`` taking ``adapter_names``, which PEFT's LoRA hands it by the same kind
    of hook. It ignores them if the active adapter has no copy of this module: hence no active adapter for the time.
    """
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    active = [wrapper._active_adapter for wrapper in wrappers]

    def hand_over(wrapper: Any, args: Any, kwargs: Any) -> Any:
        names = [name if name in wrapper._adapters else "__base__" for name in batch.of(args[0]).names]
        return args, kwargs | {"adapter_names": names}

    handles = [wrapper.register_forward_pre_hook(hand_over, with_kwargs=True) for wrapper in wrappers]
    try:
        for wrapper in wrappers:
            wrapper._active_adapter = []
        yield
    finally:
        for handle, wrapper, previous in zip(handles, wrappers, active, strict=True):
            handle.remove()
            wrapper._active_adapter = previous


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


def quantization_backend(base_layer: nn.Module, arguments: dict[str, Any]) -> QuantizationBackend | None:
    """PEFT's object for reading and writing the weights of a quantised layer, None for any other layer.

    For torchao, PEFT insists on knowing how to quantise again, which only a model from transformers' quantiser can
    tell (``get_quantization_kwargs``), and which is needed for nothing but merging.
    """

    def unknown() -> Any:
        raise ValueError("merging into torchao weights needs a model that transformers has quantised (TorchAoConfig)")

    return resolve_quantization_backend(base_layer, **({"get_apply_tensor_subclass": unknown} | arguments))


def include_quantised_linears(config: PeftConfig, model: nn.Module, is_linear: Callable[[nn.Module], bool]) -> None:
    """Resolve "all-linear" with the quantised layers that are no ``nn.Linear``, which PEFT would leave frozen, and
    without modules that this or another adapter trains in full (``modules_to_save``), which PEFT takes in: its models
    for token classification and question answering add their head only when the adapter is there.

    Relies on PEFT's ``_maybe_include_all_linear_layers`` writing names into ``target_modules``, and leaving alone what
    is resolved already. The head and what lies inside adapted layers stay out, as there.
    """
    if not (isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"):
        return
    inside = {m for layer in model.modules() if isinstance(layer, BaseTunerLayer) for m in layer.modules()}
    inner = getattr(model, "_orig_mod", model)  # of a compiled model, whose head PEFT does not see
    head = inner.get_output_embeddings() if isinstance(inner, transformers.PreTrainedModel) else None
    missed = {
        name
        for name, m in model.named_modules()
        if is_linear(m) and not isinstance(m, (nn.Linear, Conv1D)) and m not in inside and m is not head
    }
    wrapped = [name for name, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    heads = _LATE_HEADS.get(config.task_type, ())
    saved = {n for n, m in model.named_modules() if n.rpartition(".")[2] in heads or (m is head and inner is not model)}
    if missed or wrapped or saved:
        found = _maybe_include_all_linear_layers(config, model).target_modules | missed
        config.target_modules = {n for n in found - saved if not any(n.startswith(f"{path}.") for path in wrapped)}


# What PeftModelForTokenClassification and PeftModelForQuestionAnswering add to modules_to_save after the injection.
_LATE_HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def parameter_count(parameter: nn.Parameter) -> int:
    """Entries of a parameter; of bitsandbytes' packed 4-bit weights two in a byte, as PEFT counts."""
    if type(parameter).__name__ != "Params4bit":
        return parameter.numel()
    return parameter.numel() * parameter.itemsize * 2


def packed_for_inference(layer: nn.Module) -> bool:
    """Whether bitsandbytes has rearranged the 4-bit weights of a layer.

    It does so on CPUs with AVX512-BF16, in the first evaluation without gradients. Its own dequantisation then returns
    something else without an error, and no gradient passes. Relies on its flag in ``quant_state``.
    """
    return getattr(getattr(getattr(layer, "weight", None), "quant_state", None), "packing_format_for_cpu", False)


def refuse_training_through_packed(name: str, layer: nn.Module) -> None:
    """Refuse to train on above a layer through which bitsandbytes would silently pass no gradient."""
    if packed_for_inference(layer):
        raise ValueError(
            f"layer {name!r}: bitsandbytes has packed its 4-bit weights for inference on this CPU, in an evaluation "
            "without gradients, and passes no gradient through them. Set support_avx512bf16_for_cpu = False on every "
            "bitsandbytes Linear4bit of a freshly loaded model before its first evaluation."
        )
