"""Which layers are meant: ``target_modules``, "all-linear", the experts that are opened for it."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import transformers
from peft import PeftConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..base.experts import FUSED_FROM, UnfusedExperts, can_unfuse, fused_parameters
from ..base.peft_internals import (
    AuxiliaryTrainingWrapper,
    BaseTunerLayer,
    ExcludedModule,
    check_target_module_exists,
    maybe_include_all_linear_layers,
)
from ..base.weight import is_linear
from ..layer.layer import IdLoraLayer
from .names import brief

ALL_LINEAR = "all-linear"


class AllLinear(set[str]):
    """The names that "all-linear" stands for in one model; another adapter is to be asked for in the old words."""


def means_all_linear(config: PeftConfig) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR


def is_targeted(config: PeftConfig, key: str) -> Any:
    """Whether a module is targeted, or PEFT's ``ExcludedModule``."""
    found = check_target_module_exists(config, key)
    if found and config.layers_to_transform is not None and key in config.target_modules:
        # PEFT ignores layers_to_transform for targets given by their full name, as "all-linear" resolves to:
        # ask again by the last part of the name.
        suffix = dataclasses.replace(config, target_modules={key.rpartition(".")[2]})
        return check_target_module_exists(suffix, key)
    return found


def open_experts(config: PeftConfig, model: nn.Module) -> None:
    """Open the fused experts that are targeted.

    What looks like fused linear layers, is targeted and cannot be opened is an error: never silently left frozen.
    """
    unsupported = []
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        foreign = False
        if child == "base_layer":
            foreign = not isinstance(model.get_submodule(parent), (UnfusedExperts, IdLoraLayer))
            if not foreign:
                continue
            name = re.sub(r"(\.base_layer)+$", "", name)  # as it was before another tuner wrapped it
        wanted = [
            parameter
            for parameter, count in fused_parameters(module).items()
            if _targets_experts(config, name, parameter, count)
        ]
        if wanted and not foreign and can_unfuse(module):
            setattr(model.get_submodule(parent), child, UnfusedExperts(module))
        else:
            note = " (already adapted by another tuner)" if foreign else ""
            unsupported += [f"{name}.{p} {list(module.get_parameter(p).shape)}{note}" for p in wanted]
    if unsupported:
        raise ValueError(
            "target_modules takes in parameters that look like fused linear layers, of a kind ID-LoRA cannot open: "
            + ", ".join(brief(unsupported))
            + ". To leave them frozen, name their modules in exclude_modules, or other layers in target_modules."
        )


def _targets_experts(config: PeftConfig, module: str, parameter: str, count: int) -> bool:
    def asks(name: str) -> list[Any]:
        return [is_targeted(config, f"{module}.{expert}.{name}") for expert in range(count)]

    whole, each = is_targeted(config, module), asks(parameter)
    if isinstance(whole, ExcludedModule) or all(isinstance(found, ExcludedModule) for found in each):
        return False
    if whole or any(each) or means_all_linear(config):
        return True
    if parts := [part for part in FUSED_FROM.get(parameter, ()) if any(asks(part))]:
        raise ValueError(
            f"target_modules names {', '.join(parts)}, which {module!r} holds fused as {parameter}: name that too, "
            f"or leave the experts frozen with exclude_modules={[module.rpartition('.')[2]]}"
        )
    return False


def resolve_all_linear(config: PeftConfig, model: nn.Module) -> None:
    """Resolve "all-linear" with the quantised layers that are no ``nn.Linear``, which PEFT would leave frozen, and
    without modules that this or another adapter trains in full (``modules_to_save``), which PEFT takes in: its models
    for token classification and question answering add their head only when the adapter is there.

    Relies on PEFT's ``_maybe_include_all_linear_layers`` writing names into ``target_modules``, and leaving alone what
    is resolved already. The head and what lies inside adapted layers stay out, as there.
    """
    if not means_all_linear(config):
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
