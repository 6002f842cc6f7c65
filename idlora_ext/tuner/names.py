"""How layers are called, in files and in messages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import nn

from ..layer.layer import IdLoraLayer

PREFIX = "base_model.model."  # of all names in a PeftModel, and in files
_WRAPPED = re.compile(r"(^|\.)_orig_mod(?=\.|$)")  # torch.compile puts it before the names of what it has compiled


def clean(name: str) -> str:
    """A module's or tensor's name in the model that a user gave, whatever has been put around it since."""
    return _WRAPPED.sub("", name).lstrip(".").removeprefix(PREFIX)


def adapted_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, IdLoraLayer]:
    """The adapted layers of a model by their names, or those that have a certain adapter."""
    return dict(_adapted(model, adapter_name))


def _adapted(model: nn.Module, adapter_name: str | None) -> Iterator[tuple[str, IdLoraLayer]]:
    for path, module in model.named_modules():
        if isinstance(module, IdLoraLayer) and (adapter_name is None or adapter_name in module.idlora_adapter):
            yield clean(path).removesuffix(".base_layer"), module  # of another tuner, put around it since


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
