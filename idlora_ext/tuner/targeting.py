"""Which layers are meant: ``target_modules``, "all-linear", the experts that are opened for it."""

from __future__ import annotations

from collections.abc import Callable

import transformers
from peft import PeftConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..base.peft_internals import AuxiliaryTrainingWrapper, BaseTunerLayer, maybe_include_all_linear_layers


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
        found = maybe_include_all_linear_layers(config, model).target_modules | missed
        config.target_modules = {n for n in found - saved if not any(n.startswith(f"{path}.") for path in wrapped)}


# What PeftModelForTokenClassification and PeftModelForQuestionAnswering add to modules_to_save after the injection.
_LATE_HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
