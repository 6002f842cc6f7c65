"""What the tuner refuses of a model before it changes anything, and how it names layers when it does."""

from __future__ import annotations

import re
from collections.abc import Iterable

from peft import PeftConfig
from torch import nn

from . import distributed
from .base_weight import is_linear
from .config import IdLoraConfig
from .experts import UnfusedExperts
from .integration import BaseTunerLayer, ExcludedModule, check_target_module_exists
from .layer import IdLoraLayer


def brief(names: Iterable[str]) -> list[str]:
    """Layer names with their numbers gathered: ``layers.0.q``, ``layers.1.q`` become ``layers.{0-1}.q``.

    Gathered are the first numbers and then the last ones: those of layers, and those of experts in them.
    """
    return _gather(r"(?:(.*\.)(\d+)(?=\.))?(.*)", _gather(r"(?:(.*?\.)?(\d+))?(.*)", names))


def _gather(pattern: str, names: Iterable[str]) -> list[str]:
    groups: dict[tuple[str, str], list[int]] = {}
    for name in names:
        head, number, tail = re.fullmatch(pattern, name).groups()  # type: ignore[union-attr]
        groups.setdefault((head or "", tail), []).extend([int(number)] if number else [])
    result = []
    for (head, tail), numbers in groups.items():
        runs: list[list[int]] = []
        for n in sorted(numbers):
            if runs and n == runs[-1][1] + 1:
                runs[-1][1] = n
            else:
                runs.append([n, n])
        ranges = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
        result.append(head + (f"{{{ranges}}}" if len(numbers) > 1 else ranges) + tail)
    return result


def refuse_foreign_layers(config: PeftConfig, model: nn.Module) -> None:
    if str(config.target_modules).lower() != "all-linear":
        return  # a layer that is named is refused as such
    foreign = [
        name
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
        and not isinstance(module, IdLoraLayer)
        and not isinstance(check_target_module_exists(config, name), ExcludedModule)
    ]
    if foreign:
        raise ValueError(
            'target_modules="all-linear" takes in layers that another tuner has adapted: '
            + ", ".join(brief(foreign))
            + ". Name other layers in target_modules, these in exclude_modules, or remove that adapter (unload) first."
        )


def refuse_existing(model: nn.Module, adapter_name: str) -> None:
    other = vars(model).get("peft_config", {}).get(adapter_name)
    if other is not None and not isinstance(other, IdLoraConfig):
        raise ValueError(
            f"the model already has an adapter {adapter_name!r}, of the method {other.peft_type.value}, whose "
            "configuration would be lost. Give the new one another adapter_name."
        )
    for name, module in model.named_modules():
        if isinstance(module, IdLoraLayer) and adapter_name in module.idlora_B:
            raise ValueError(
                f"the model already has an ID-LoRA adapter {adapter_name!r} (first at layer {name!r}). Give the new "
                f"one another adapter_name, or remove it first: idlora_ext.remove(model, {adapter_name!r})."
            )


def unsupported(target: nn.Module, parent: nn.Module, dropout: float) -> str | None:
    """Why a target cannot be adapted, or None."""
    if isinstance(target, BaseTunerLayer) and not isinstance(target, IdLoraLayer):
        return f"already adapted by {type(target).__module__}.{type(target).__qualname__}"
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weights without calling it"
    if isinstance(target, UnfusedExperts):
        return f"{type(target.base_layer).__qualname__}: name its parameters, such as down_proj, instead"
    if not isinstance(target, IdLoraLayer) and not is_linear(target):
        return type(target).__qualname__
    return distributed.unsupported(target.get_base_layer() if isinstance(target, IdLoraLayer) else target, dropout)
