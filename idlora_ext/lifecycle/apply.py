"""``apply``: an ID-LoRA adapter for any ``nn.Module``, in place."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from peft import PeftModel, set_peft_model_state_dict
from peft.functional import cast_adapter_dtype
from torch import Tensor, nn

from ..layer.config import IdLoraConfig
from ..tuner.model import IdLoraModel
from ..tuner.restore import restored_on_failure
from ..tuner.verify import forget_transformers_load


def apply(
    model: nn.Module,
    config: IdLoraConfig | None = None,
    *,
    adapter_name: str = "default",
    progress: bool = True,
    **fields: Any,
) -> nn.Module:
    """Adapt a model in place: every targeted layer becomes ``y = y0 + scaling * concat_j(B z^(j))`` with ``B = 0``.

    Rows are chosen by clustering (a progress bar shows it), everything but the adapter is frozen, and the new adapter
    is the active one. A transformers model can then be trained with ``Trainer`` and saved with ``save_pretrained``,
    adapter only. Until ``B`` is trained, a layer without bias returns what it returned before, bit for bit. In several
    processes (``torch.distributed``) every rank calls this, and they share the work.

    Args:
        model: any ``nn.Module`` with ``nn.Linear`` or ``Conv1D`` layers. For a ``PeftModel`` use its ``add_adapter``.
        config: the adapter's settings; by default ``IdLoraConfig()``. It is copied, never changed.
        adapter_name: a model can hold several adapters.
        progress: show a bar while clustering.
        **fields: fields of :class:`IdLoraConfig`, overriding those of ``config``.

    Returns:
        The same object. Adapter parameters of float16 and bfloat16 models are float32, as PEFT makes them.

    Raises:
        TypeError, ValueError: on what cannot be done, naming the field or the layers. The model is then exactly as
            it was before the call.
    """
    if isinstance(model, PeftModel):
        raise TypeError("apply: the model is a PeftModel already; use model.add_adapter(adapter_name, IdLoraConfig())")
    if not isinstance(model, nn.Module):
        raise TypeError(f"apply: model must be an nn.Module, got {type(model).__qualname__}")
    if config is not None and not isinstance(config, IdLoraConfig):
        raise TypeError(f"apply: config must be an IdLoraConfig, got {type(config).__qualname__}")
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise ValueError(f"apply: adapter_name must be a non-empty string without dots, got {adapter_name!r}")
    known = {f.name for f in dataclasses.fields(IdLoraConfig) if f.init} | {"preset"}
    if unknown := sorted(set(fields) - known):
        raise TypeError(f"apply: IdLoraConfig has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    if config is None:  # made at once, as a preset yields to what is given and not to defaults
        config = IdLoraConfig(**fields, index_stored=False)
    else:
        config = dataclasses.replace(copy.deepcopy(config), **fields, index_stored=False)
    return inject(model, config, adapter_name, progress=progress)


def inject(
    model: nn.Module,
    config: IdLoraConfig,
    adapter_name: str,
    *,
    tensors: dict[str, Tensor] | None = None,
    progress: bool = True,
) -> nn.Module:
    """Put an adapter into a model, freshly chosen or from ``tensors``, and activate it; undo everything on failure."""
    config = copy.deepcopy(config)
    config.base_model_name_or_path = vars(model).get("name_or_path") or None
    if tensors is None:
        _fit_to_task(config, model)
    with restored_on_failure(model):
        tuner = IdLoraModel(model, config, adapter_name, progress=progress)
        cast_adapter_dtype(model, adapter_name=adapter_name)
        if tensors is not None:
            set_peft_model_state_dict(model, tensors, adapter_name=adapter_name)
            forget_transformers_load(model)
        tuner.set_adapter(adapter_name, inference_mode=config.inference_mode)
    if hasattr(type(model), "_hf_peft_config_loaded"):  # transformers: save_pretrained writes the adapter only
        model._hf_peft_config_loaded = True  # type: ignore[assignment]
    return model


_TASKS = {  # as PEFT's own task models have it: what ends a transformers class name, and the heads to train in full
    "ForCausalLM": ("CAUSAL_LM", ()),
    "LMHeadModel": ("CAUSAL_LM", ()),
    "ForConditionalGeneration": ("SEQ_2_SEQ_LM", ()),
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
    "ForImageClassification": (None, ("classifier",)),
}


def _fit_to_task(config: IdLoraConfig, model: nn.Module) -> None:
    """What ``get_peft_model`` does with a ``task_type``, which ``apply`` reads off the class of the model.

    The task goes into the file, where PEFT's Auto classes look for it; a task's new head is trained in full.
    """
    for ending, (task, heads) in _TASKS.items():
        if hasattr(type(model), "_hf_peft_config_loaded") and type(model).__name__.endswith(ending):
            if ending == "ForConditionalGeneration" and not getattr(model.config, "is_encoder_decoder", False):
                continue  # a vision-language model, for which PEFT has no task
            config.task_type = config.task_type or task
            if config.modules_to_save is None and config.task_type == task:
                config.modules_to_save = [name for name, _ in model.named_children() if name in heads] or None
