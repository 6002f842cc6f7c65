"""The rows of a batch by adapter: what an adapted layer has to know to run each with its own.

Rows are grouped by adapter once per call of the model. A layer runs its base layer on the whole batch, brings the rows
of ``y0`` together (one ``index_select``), adapts every group as one contiguous slice, and puts the rows back. Nothing
is moved if equal names lie next to one another already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

BASE = "__base__"  # PEFT's name for no adapter


class Groups:
    """The rows of a batch by adapter: ``order`` brings them together, ``inverse`` takes them back."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            rows.setdefault(name, []).append(row)
        self.slices: list[tuple[str, slice]] = []
        order: list[int] = []
        for name, members in rows.items():
            self.slices.append((name, slice(len(order), len(order) + len(members))))
            order += members
        self.sorted = order == list(range(len(order)))
        self._order = torch.tensor(order, dtype=torch.long, device="cpu")
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``(order, inverse)``, made once for every device."""
        if device not in self._on:
            self._on[device] = (self._order.to(device), self._order.argsort().to(device))
        return self._on[device]


class MixedBatch:
    """What the layers of a model need to know of a mixed batch.

    ``repeat``: ``generate`` repeats every row that often for beams; an encoder still sees the rows unrepeated.
    """

    def __init__(self, names: Sequence[str], repeat: int = 1) -> None:
        repeated = [name for name in names for _ in range(repeat)]
        self.groups = {len(rows): Groups(rows) for rows in (names, repeated)}
        self.count = len(repeated)

    def of(self, h: Tensor) -> Groups:
        """The groups of a batch with as many rows as ``h [batch, ..., d_in]``."""
        groups = self.groups.get(len(h))
        if groups is None:
            self._refuse(len(h))
        return groups

    def check_inputs(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Refuse what a model is called with if it does not have a row for each name."""
        named = [kwargs.get(name) for name in ("input_ids", "inputs_embeds", "inputs")]
        given = next((t for t in (*named, *args, *kwargs.values()) if isinstance(t, Tensor) and t.ndim), None)
        if given is not None and len(given) not in self.groups:
            self._refuse(len(given))

    def _refuse(self, rows: int) -> NoReturn:
        raise ValueError(
            f"Length of `adapter_names` should be the same as the number of inputs, but got {self.count} and {rows} "
            "respectively. Rows must be the entries of the batch: a layer that sees the batch flattened or in another "
            "order cannot tell whose they are, and beams or several returned sequences must be said (num_beams)."
        )
