"""Merging: ``W' = W + sum over adapters of scaling * diag(B, .., B) sum_i a_i A_i``, for static routers.

With constants ``a_i`` the update of arXiv 2602.20727, eq. 4, is a matrix of rank ``r`` beside ``W``, so ``W`` can hold
it. The rows of ``A_i = W[index_i]`` (with ``row_scale`` ``diag(c_i) W[index_i]``) are always those of the original
``W``, which each merged layer keeps: a second adapter, an adapter that is added or saved meanwhile, and
:func:`idlora_ext.to_lora` all read it and never the merged weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.pytorch_utils import Conv1D

from . import distributed
from .base_weight import base_weight, is_quantised, stored
from .fakes import accumulate
from .integration import BaseTunerLayer, check_adapters_to_merge

MERGE_REFUSED = (
    "with a linear or bounded router it cannot be merged, nor exported as a LoRA: its weights a_i depend on the token "
    "through <T_i, A_i h>, so no single W holds the update. Keep the adapter attached, or train one with "
    'router="static", which can.'
)


class MergeableLayer(BaseTunerLayer):
    """The part of an adapted layer that PEFT's ``merge_adapter``, ``unmerge_adapter`` and ``merge_and_unload`` call.

    ``unmerged_weight [d, d_in]`` is a copy of ``W``, held while adapters are merged: it costs the memory of ``W`` once
    more, and buys that unmerging restores ``W`` bit for bit and that several adapters are rounded once together.
    ``merge_and_unload`` holds it for one layer at a time.
    """

    name: str
    unmerged_weight: Tensor | None = None
    idlora_index: Any
    idlora_row_scale: Any
    idlora_router: Any
    idlora_B: Any
    scaling: dict[str, float]
    merged_adapters: list[str]
    quantization_backend: Any

    def is_static(self, adapter_name: str) -> bool:
        return self.idlora_router[adapter_name].ndim == 1

    @torch.no_grad()
    def lora_factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """``A = sum_i a_i A_i [r, d_in]`` and ``scaling * B [d/s, r/s]``, float32 (float64 if ``W`` is).

        Raises:
            ValueError: the router is not static.
        """
        if not self.is_static(adapter_name):
            raise ValueError(f"layer {self.name!r}, adapter {adapter_name!r}: {MERGE_REFUSED}")
        W, index = self.get_base_weight(), self.idlora_index[adapter_name].long()
        dtype = accumulate(W.dtype)
        a = self.idlora_router[adapter_name].to(dtype).expand(len(index)).unsqueeze(-1)
        if adapter_name in self.idlora_row_scale:
            a = a * self.idlora_row_scale[adapter_name].to(dtype)
        A = torch.zeros(index.shape[1], W.shape[1], dtype=dtype, device=W.device)
        for a_i, rows in zip(a, index, strict=True):
            A.addcmul_(W[rows].to(dtype), a_i.unsqueeze(-1))
        return A, self.scaling[adapter_name] * self.idlora_B[adapter_name].to(dtype)

    @torch.no_grad()
    def update_matrix(self, adapter_name: str) -> Tensor:
        """``scaling * diag(B, .., B) A [d, d_in]``, float32 (float64 if ``W`` is)."""
        A, B = self.lora_factors(adapter_name)
        return (B @ A.unflatten(0, (-1, B.shape[1]))).flatten(0, 1)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """:meth:`update_matrix` as the base layer stores its weight, ``[d_in, d]`` of a ``Conv1D``.

        PEFT's ``convert_to_lora`` asks.
        """
        update = self.update_matrix(adapter_name)
        return update.t() if isinstance(self.get_base_layer(), Conv1D) else update

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return adapter_name in self.idlora_B and self.is_static(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to ``W``, in place; ``forward`` is then the base layer alone.

        Args:
            safe_merge: refuse a result that is not finite, before anything changes.
            adapter_names: by default the active ones.

        Raises:
            ValueError: see :func:`refuse`; ``W`` is as it was.
        """
        check_adapters_to_merge(self, adapter_names)  # for its warnings
        adapters = _new(self, adapter_names)
        if not adapters:
            return
        refuse(self, adapters)
        merged = merged_weight(self, adapters, safe_merge)
        if self.unmerged_weight is None:
            self.unmerged_weight = self.get_base_weight().clone()
        _write(self, merged)
        self.merged_adapters += adapters

    def unmerge(self) -> None:
        """Put the original ``W`` back, bit for bit."""
        if self.unmerged_weight is not None:
            _write(self, self.unmerged_weight)
        self.unmerged_weight = None
        self.merged_adapters.clear()

    def enable_adapters(self, enabled: bool) -> None:
        # Here and not in forward, as other tuners do: open experts are called as a whole while adapters are disabled.
        if not enabled:
            self.unmerge()
        super().enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.merged_adapters:
            self.unmerge()
        super().delete_adapter(adapter_name)


@torch.no_grad()
def merged_weight(layer: Any, adapters: Sequence[str], safe: bool) -> Tensor:
    """``W`` with ``adapters`` and those it holds already, added up in float32 and rounded once to its dtype.

    Raises:
        ValueError: ``safe``, and the result is not finite.
    """
    W = layer.get_base_weight()
    merged = W.to(accumulate(W.dtype), copy=True)
    for adapter in (*layer.merged_adapters, *adapters):
        merged += layer.update_matrix(adapter)
    merged = merged.to(W.dtype)
    if safe and not merged.isfinite().all():
        raise ValueError(
            f"layer {layer.name!r}: NaNs detected in the merged weights. The adapter {', '.join(adapters)} seems to be "
            f"broken, or {W.dtype} does not hold the sum. Nothing was merged."
        )
    return merged


@torch.no_grad()
def _write(layer: Any, weight: Tensor) -> None:
    # Not `.data =`: the weight of an expert is a view, made anew at each access.
    base_weight(layer.get_base_layer(), None).copy_(weight)


def _new(layer: Any, adapter_names: Sequence[str] | None) -> list[str]:
    names = layer.active_adapters if adapter_names is None else adapter_names
    return [a for a in dict.fromkeys(names) if a in layer.idlora_B and a not in layer.merged_adapters]


def refuse(layer: Any, adapters: Sequence[str]) -> None:
    """Refuse to merge what a weight cannot hold.

    Raises:
        ValueError: adapters are disabled or without rows, a router is not static, or ``W`` is packed, sharded, not
            there or computed from other parameters; naming the layer and the way out.
    """
    layer.refuse_pending(adapters)
    for adapter in adapters:
        if not layer.is_static(adapter):
            raise ValueError(f"layer {layer.name!r}, adapter {adapter!r}: {MERGE_REFUSED}")
    base = layer.get_base_layer()
    reason = None
    if layer.disable_adapters:
        reason = "the adapters are disabled: enable them first"
    elif distributed.is_sharded(stored(base)):
        reason = "W is sharded over several processes: save the adapter, and merge it into a model loaded in one"
    elif is_quantised(base, layer.quantization_backend):
        reason = "W is quantised: keep the adapter attached, or merge it into the same model in full precision"
    elif stored(base).is_meta:
        reason = "W is on the meta device (offloaded, or not loaded): load the model without offloading"
    elif is_parametrized(base):
        reason = "W is computed from other parameters: remove the parametrisation first, or keep the adapter attached"
    if reason is not None:
        raise ValueError(f"layer {layer.name!r} cannot be merged: {reason}")


def check(model: nn.Module, adapter_names: Sequence[str] | None, safe_merge: bool) -> None:
    """Refuse a merge of all layers before the first one changes.

    Raises:
        TypeError: ``adapter_names`` is no list.
        ValueError: an adapter that no layer has, a weight that another module uses too, and :func:`refuse`.
    """
    if isinstance(adapter_names, str):
        raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
    layers = list(mergeable(model))
    known = {name for layer in layers for name in layer.idlora_B}
    if unknown := [name for name in adapter_names or () if name not in known]:
        raise ValueError(f"there is no adapter {', '.join(map(repr, unknown))} to merge; the model has {sorted(known)}")
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    merging = [(layer, adapters) for layer in layers if (adapters := _new(layer, adapter_names))]
    for layer, adapters in merging:
        refuse(layer, adapters)
        if len(names := owners.get(id(layer.get_base_layer().weight), [])) > 1:
            raise ValueError(
                f"layer {layer.name!r} cannot be merged: its weight is that of {', '.join(names)}, and merging "
                "would change it for all. Untie them (tie_word_embeddings=False), or leave the layer out with "
                "exclude_modules."
            )
    if safe_merge:
        for layer, adapters in merging:
            merged_weight(layer, adapters, safe=True)


def mergeable(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, MergeableLayer))
