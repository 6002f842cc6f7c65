"""``summary``: what was adapted, as a table and as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ..base import quantised
from ..tuner.names import adapted_layers


@dataclass(frozen=True)
class LayerSummary:
    """One adapted layer: ``W [d, d_in]``, ``k`` clusters of ``r`` rows, ``B [d/s, r/s]``."""

    name: str
    d: int
    d_in: int
    k: int
    r: int
    s: int
    trainable: int  # parameters of router and B
    share: float  # trainable / trainable parameters of all adapted layers
    shrunk: bool  # r is smaller than asked for, because k * r rows did not fit into d


@dataclass(frozen=True)
class Summary:
    """The adapted layers of a model. ``print`` shows a table; ``to_dict`` gives plain data."""

    adapter_name: str
    rows: list[LayerSummary]
    other_trainable: int  # trainable parameters outside the adapter, such as modules_to_save
    total_parameters: int  # trainable and frozen, the adapter included

    @property
    def B_parameters(self) -> int:
        """``sum d r / s^2``."""
        return sum((row.d // row.s) * (row.r // row.s) for row in self.rows)

    @property
    def router_parameters(self) -> int:
        return sum(row.trainable for row in self.rows) - self.B_parameters

    @property
    def trainable_parameters(self) -> int:
        return sum(row.trainable for row in self.rows) + self.other_trainable

    @property
    def percent(self) -> float:
        """``100 * trainable / (trainable + frozen)``, as PEFT prints it."""
        return 100 * self.trainable_parameters / self.total_parameters

    def to_dict(self) -> dict[str, Any]:
        totals = ("B_parameters", "router_parameters", "trainable_parameters", "percent")
        return asdict(self) | {name: getattr(self, name) for name in totals}

    def __str__(self) -> str:
        width = max([len("layer"), *(len(row.name) for row in self.rows)])
        head = f"{'layer':<{width}}  {'d':>6} {'d_in':>6} {'k':>3} {'r':>4} {'s':>2} {'trainable':>11} {'share':>7}"
        lines = [head, "-" * len(head)]
        for row in self.rows:
            lines.append(
                f"{row.name:<{width}}  {row.d:>6} {row.d_in:>6} {row.k:>3} {row.r:>4} {row.s:>2} "
                f"{row.trainable:>11,} {row.share:>7.2%}{'  shrunk' if row.shrunk else ''}"
            )
        shrunk = sum(row.shrunk for row in self.rows)
        lines += [
            "-" * len(head),
            f"adapter {self.adapter_name!r}: {len(self.rows)} layers{f', {shrunk} shrunk' if shrunk else ''}; "
            f"B {self.B_parameters:,} + router {self.router_parameters:,}"
            + (f" + other modules {self.other_trainable:,}" if self.other_trainable else "")
            + f" = {self.trainable_parameters:,} trainable of {self.total_parameters:,} ({self.percent:.2f} %)",
        ]
        return "\n".join(lines)


def summary(model: nn.Module, adapter_name: str = "default") -> Summary:
    """List the layers an adapter is in: d, k, r, s, trainable parameters, share of the total, shrunken layers.

    Args:
        model: adapted by any of the doors, on any device (the meta device too).
        adapter_name: the adapter.

    Raises:
        ValueError: the model has no such adapter.
    """
    layers = adapted_layers(model, adapter_name)
    if not layers:
        raise ValueError(f"summary: the model has no ID-LoRA adapter {adapter_name!r}")
    adapters = {name: layer.idlora_adapter[adapter_name] for name, layer in layers.items()}
    sizes = {name: sum(p.numel() for p in adapter.parameters()) for name, adapter in adapters.items()}
    rows = []
    for name, layer in layers.items():
        k, r = adapters[name].index.shape
        rows.append(
            LayerSummary(
                name=name,
                d=layer.out_features,
                d_in=layer.in_features,
                k=k,
                r=r,
                s=r // adapters[name].B.shape[1],
                trainable=sizes[name],
                share=sizes[name] / sum(sizes.values()),
                shrunk=r < adapters[name].wanted_rank,
            )
        )
    own = {id(p) for layer in layers.values() for p in layer.idlora_adapter.parameters()}
    other = sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in own)
    return Summary(adapter_name, rows, other, sum(map(quantised.parameter_count, model.parameters())))
