"""``adapter_names``: a batch whose rows use different adapters. How layers do it: ``layer/mixed_rows.py``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ..base.peft_internals import AuxiliaryTrainingWrapper, BaseTunerLayer
from ..layer.layer import IdLoraLayer
from ..layer.mixed_rows import BASE, MixedBatch


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
            module.refuse_merged()
            module.refuse_pending(names)
            if "experts" in path.split("."):
                raise ValueError(
                    f"Cannot pass `adapter_names`: the adapted layer {path!r} sees the tokens routed to it, not the "
                    "rows of the batch. Run the rows of each adapter as a batch of their own (set_adapter)."
                )
        elif isinstance(module, BaseTunerLayer) and module not in saved:
            raise ValueError(f"Cannot pass `adapter_names`: layer {path!r} has an adapter of another method")
    known = {name for layer in layers for name in layer.idlora_adapter}
    if unknown := sorted(set(names) - known - {BASE}):
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. The model has {sorted(known)}."
        )

    batch = MixedBatch(names, num_beams)
    for groups in batch.groups.values():
        for device in {p.device for layer in layers for p in layer.idlora_adapter.parameters() if not p.is_meta}:
            groups.on(device)  # here, so that no layer waits for a copy to its device
    before = [layer.mixed_batch for layer in layers]

    def check(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        batch.check_inputs(args, kwargs)

    with mixed_saved_modules(model, batch):
        handle = model.register_forward_pre_hook(check, with_kwargs=True)
        try:
            for layer in layers:
                layer.mixed_batch = batch
            yield batch
        finally:
            handle.remove()
            for layer, previous in zip(layers, before, strict=True):
                layer.mixed_batch = previous
