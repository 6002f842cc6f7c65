"""Batches whose rows use different adapters, as PEFT's ``adapter_names`` asks for them.

Rows are grouped by adapter once per call of the model. A layer runs its base layer on the whole batch, brings the rows
of ``y0`` together (one ``index_select``), adapts every group as one contiguous slice, and puts the rows back. Nothing
is moved if equal names lie next to one another already.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from . import integration
from .integration import AuxiliaryTrainingWrapper, BaseTunerLayer

if TYPE_CHECKING:
    from .layer import IdLoraLayer

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

    def forward(self, layer: IdLoraLayer, h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``h [batch, ..., d_in]`` to ``[batch, ..., d]``, every row as if it were run alone with its adapter."""
        if layer.disable_adapters:  # as with PEFT's LoRA, that has precedence
            return layer.base_layer(h, *args, **kwargs)
        refuse_merged(layer)
        groups = self.of(h)
        if not any(name in layer.idlora_B for name, _ in groups.slices):
            return layer.base_layer(h, *args, **kwargs)
        y0, bias, bias_in_y0 = layer._base_output(h, *args, **kwargs)
        if not groups.sorted:
            order, inverse = groups.on(y0.device)
            y0 = y0.index_select(0, order)
        parts = []
        for name, rows in groups.slices:
            if name in layer.idlora_B:
                parts.append(layer.adapt([name], y0[rows], bias, bias_in_y0))
            elif bias is None or bias_in_y0:
                parts.append(y0[rows])
            else:  # not y0 + bias, which is rounded once more than the base layer's own output
                parts.append(layer.base_layer(h[rows] if groups.sorted else h.index_select(0, order[rows])))
        y = parts[0] if len(parts) == 1 else torch.cat(parts)
        return y if groups.sorted else y.index_select(0, inverse)


@contextlib.contextmanager
def adapter_names(model: nn.Module, names: Sequence[str], *, num_beams: int = 1) -> Iterator[MixedBatch]:
    """``y_n = y0_n + scaling * concat_j(B z_n^(j))`` with ``B`` and the router of adapter ``names[n]`` for row ``n``.

    >>> with idlora_ext.adapter_names(model, ["french", "__base__", "french"]):
    ...     model.generate(**three_prompts)

    Holds inside the context, for layers whose adapters are not disabled. They may differ in rank, clusters, router and
    dtype. For a ``PeftModel``,
    ``model(..., adapter_names=...)`` and ``model.generate(..., adapter_names=...)`` do the same.

    Args:
        model: adapted by :func:`idlora_ext.apply`, ``add_adapter`` or ``get_peft_model``, in evaluation mode (PEFT has
            mixed batches for inference only; gradients do flow).
        names: one for each row of the batch; ``"__base__"`` is the base model.
        num_beams: what ``generate`` is called with inside, or ``num_return_sequences`` if that is more: it repeats
            every row that often.

    Raises:
        TypeError, ValueError: before anything runs, on names that no layer has, in training mode, on merged adapters,
            adapted layers that do not see the rows of the batch (experts), and, as ``model`` is called, on a number of
            names that is not the number of rows.
    """
    from .layer import IdLoraLayer

    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"adapter_names must be a list of strings, one for each row of the batch, got {names!r}")
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode. Call model.eval() first.")
    wrappers = (module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper))
    saved = {module for wrapper in wrappers for module in wrapper.modules()}  # they take part in their own way
    layers = []
    for path, module in model.named_modules():
        if isinstance(module, IdLoraLayer):
            layers.append(module)
            refuse_merged(module)
            module.refuse_pending(names)
            if "experts" in path.split("."):
                raise ValueError(
                    f"Cannot pass `adapter_names`: the adapted layer {path!r} sees the tokens routed to it, not the "
                    "rows of the batch. Run the rows of each adapter as a batch of their own (set_adapter)."
                )
        elif isinstance(module, BaseTunerLayer) and module not in saved:
            raise ValueError(f"Cannot pass `adapter_names`: layer {path!r} has an adapter of another method")
    known = {name for layer in layers for name in layer.idlora_B}
    if unknown := sorted(set(names) - known - {BASE}):
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. The model has {sorted(known)}."
        )

    batch = MixedBatch(names, num_beams)
    for groups in batch.groups.values():
        for device in {B.device for layer in layers for B in layer.idlora_B.values() if not B.is_meta}:
            groups.on(device)  # here, so that no layer waits for a copy to its device
    before = [layer.mixed_batch for layer in layers]

    def check(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        batch.check_inputs(args, kwargs)

    with integration.mixed_saved_modules(model, batch):
        handle = model.register_forward_pre_hook(check, with_kwargs=True)
        try:
            for layer in layers:
                layer.mixed_batch = batch
            yield batch
        finally:
            handle.remove()
            for layer, previous in zip(layers, before, strict=True):
                layer.mixed_batch = previous


def refuse_merged(layer: IdLoraLayer) -> None:
    if layer.merged:
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
