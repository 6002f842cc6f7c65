"""Merging: ``W' = W + sum over adapters of scaling * diag(B, .., B) sum_i a_i A_i``, for static routers.

With constants ``a_i`` the update of arXiv 2602.20727, eq. 4, is a matrix of rank ``r`` beside ``W``, so ``W`` can hold
it. The rows of ``A_i = W[index_i]`` (with ``row_scale`` ``diag(c_i) W[index_i]``) are always those of the original
``W``, which each merged layer keeps: a second adapter, an adapter that is added or saved meanwhile, and
:func:`idlora_ext.to_lora` all read it and never the merged weight.

A centred adapter (``x_i = (W h + b - m)[index_i]``) also changes the bias, ``b' = b + scaling * diag(B, .., B) c`` with
``c = sum_i a_i (b - m)[index_i]``: a layer without one gets one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.pytorch_utils import Conv1D

from ..base import sharding
from ..base.experts import ExpertLinear
from ..base.peft_internals import check_adapters_to_merge
from ..base.weight import base_weight, is_quantised, stored
from ..ops.fakes import accumulate
from .layer import IdLoraLayer

MERGE_REFUSED = (
    "with a linear or bounded router it cannot be merged, nor exported as a LoRA: its weights a_i depend on the token "
    "through <T_i, A_i h>, so no single W holds the update. Keep the adapter attached, or train one with "
    'router="static", which can.'
)


class MergeableLayer(IdLoraLayer):
    """The part of an adapted layer that PEFT's ``merge_adapter``, ``unmerge_adapter`` and ``merge_and_unload`` call.

    ``unmerged_weight [d, d_in]`` is a copy of ``W``, held while adapters are merged: it costs the memory of ``W`` once
    more, and buys that unmerging restores ``W`` bit for bit and that several adapters are rounded once together.
    ``merge_and_unload`` holds it for one layer at a time. ``unmerged_bias [d]`` is the bias then, or None.
    """

    unmerged_bias: Tensor | None = None

    def lora_factors(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """``A``, ``scaling * B`` and ``c`` of :meth:`idlora_ext.layer.adapter.Adapter.lora_factors`.

        Raises:
            ValueError: the router is not static.
        """
        adapter = self.idlora_adapter[adapter_name]
        if not adapter.is_static:
            raise ValueError(f"layer {self.name!r}, adapter {adapter_name!r}: {MERGE_REFUSED}")
        return adapter.lora_factors(self.get_base_weight(), self.get_base_bias())

    def get_base_bias(self) -> Tensor | None:
        """``b [d]`` or None, without what is merged into it."""
        bias = self.get_base_layer().bias if self.unmerged_weight is None else self.unmerged_bias
        return bias if bias is None else bias.detach()

    @torch.no_grad()
    def update(self, adapter_name: str) -> tuple[Tensor, Tensor | None]:
        """``scaling * diag(B, .., B)`` times ``A``, and times ``c``: what is added to ``W [d, d_in]`` and ``b [d]``."""
        A, B, c = self.lora_factors(adapter_name)

        def boosted(z: Tensor) -> Tensor:
            return (B @ z.unflatten(0, (-1, B.shape[1]))).flatten(0, 1)

        return boosted(A), None if c is None else boosted(c.unsqueeze(1)).squeeze(1)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What is added to the weight as the base layer stores it, ``[d_in, d]`` of a ``Conv1D``.

        PEFT's ``convert_to_lora`` asks.
        """
        update, _ = self.update(adapter_name)
        return update.t() if isinstance(self.get_base_layer(), Conv1D) else update

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        # PEFT converts a matrix alone, and a centred adapter also adds a constant; to_lora writes both.
        if adapter_name not in self.idlora_adapter:
            return False
        adapter = self.idlora_adapter[adapter_name]
        return adapter.is_static and adapter.mean is None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to ``W`` (and ``b``), in place; ``forward`` is then the base layer alone.

        Args:
            safe_merge: refuse a result that is not finite, before anything changes.
            adapter_names: by default the active ones.

        Raises:
            ValueError: see :func:`refuse_merge`; ``W`` is as it was.
        """
        check_adapters_to_merge(self, adapter_names)  # for its warnings
        adapters = not_merged(self, adapter_names)
        if not adapters:
            return
        refuse_merge(self, adapters)
        weight, bias = merged_tensors(self, adapters, safe_merge)
        if self.unmerged_weight is None:
            before = self.get_base_bias()
            self.unmerged_weight = self.get_base_weight().clone()
            self.unmerged_bias = None if before is None else before.clone()
        _write(self, weight, bias)
        self.merged_adapters += adapters

    def unmerge(self) -> None:
        """Put the original ``W`` and ``b`` back, bit for bit."""
        if self.unmerged_weight is not None:
            _write(self, self.unmerged_weight, self.unmerged_bias)
        self.unmerged_weight = self.unmerged_bias = None
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
def merged_tensors(layer: MergeableLayer, adapters: Sequence[str], safe: bool) -> tuple[Tensor, Tensor | None]:
    """``W`` with ``adapters`` and those it holds already, added up in float32 and rounded once to its dtype; and so
    ``b``, or None if there is none and none is needed.

    Raises:
        ValueError: ``safe``, and the result is not finite.
    """
    W, b = layer.get_base_weight(), layer.get_base_bias()
    weight, bias = W.to(accumulate(W.dtype), copy=True), b
    for adapter in (*layer.merged_adapters, *adapters):
        matrix, vector = layer.update(adapter)
        weight += matrix
        if vector is not None:
            bias = vector if bias is None else bias + vector
    weight = weight.to(W.dtype)
    if b is None and bias is not None and not bias.any():  # a mean that was never taken: no bias is needed
        bias = None
    elif bias is not None:
        bias = bias.to(W.dtype if b is None else b.dtype)
    if safe and not all(tensor.isfinite().all() for tensor in (weight, bias) if tensor is not None):
        raise ValueError(
            f"layer {layer.name!r}: NaNs detected in the merged weights. The adapter {', '.join(adapters)} seems to be "
            f"broken, or {W.dtype} does not hold the sum. Nothing was merged."
        )
    return weight, bias


@torch.no_grad()
def _write(layer: MergeableLayer, weight: Tensor, bias: Tensor | None) -> None:
    """Make ``W`` and ``b`` of the base layer these; a bias that is None is taken away."""
    # Not `.data =`: the weight of an expert is a view, made anew at each access.
    base = layer.get_base_layer()
    base_weight(base, None).copy_(weight)
    if base.bias is not None and bias is not None:
        base.bias.copy_(bias)
    elif base.bias is not bias:
        base.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)


def not_merged(layer: MergeableLayer, adapter_names: Sequence[str] | None) -> list[str]:
    names = layer.active_adapters if adapter_names is None else adapter_names
    return [a for a in dict.fromkeys(names) if a in layer.idlora_adapter and a not in layer.merged_adapters]


def refuse_merge(layer: MergeableLayer, adapters: Sequence[str]) -> None:
    """Refuse to merge what a weight cannot hold.

    Raises:
        ValueError: adapters are disabled or without rows, a router is not static, or ``W`` is packed, sharded, not
            there or computed from other parameters; naming the layer and the way out.
    """
    layer.refuse_pending(adapters)
    for adapter in adapters:
        if not layer.idlora_adapter[adapter].is_static:
            raise ValueError(f"layer {layer.name!r}, adapter {adapter!r}: {MERGE_REFUSED}")
    base = layer.get_base_layer()
    reason = None
    if layer.disable_adapters:
        reason = "the adapters are disabled: enable them first"
    elif sharding.is_sharded(stored(base)):
        reason = "W is sharded over several processes: save the adapter, and merge it into a model loaded in one"
    elif is_quantised(base, layer.quantization_backend):
        reason = "W is quantised: keep the adapter attached, or merge it into the same model in full precision"
    elif stored(base).is_meta:
        reason = "W is on the meta device (offloaded, or not loaded): load the model without offloading"
    elif is_parametrized(base):
        reason = "W is computed from other parameters: remove the parametrisation first, or keep the adapter attached"
    elif (
        isinstance(base, ExpertLinear)
        and base.bias is None
        and any(layer.idlora_adapter[a].mean is not None for a in adapters)
    ):
        reason = (
            "a centred adapter changes the bias, and fused experts without one have no place for it: keep the adapter "
            "attached, or train one with center=False"
        )
    if reason is not None:
        raise ValueError(f"layer {layer.name!r} cannot be merged: {reason}")
