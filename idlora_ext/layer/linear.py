"""What an adapted layer computes: the frozen layer's output, passed through the adapters at work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..base import quantised, sharding
from ..base.weight import is_plain
from ..ops import nvtx
from ..ops.column_parallel import Columns
from ..ops.functional import undisturbed
from .adapter import Adapter, BaseOutput, beside
from .centering import take_means
from .config import IdLoraConfig
from .merging import MergeableLayer


class Linear(nn.Module, MergeableLayer):
    """``y = h W^T + b + scaling * concat_j(B z^(j))`` for whatever returns ``h W^T + b``."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: IdLoraConfig,
        num_clusters: int,
        wanted_rank: int,
        quantization: dict[str, Any] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        MergeableLayer.__init__(self, base_layer, quantization)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, num_clusters, wanted_rank)

    def forward(self, h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``h [..., d_in]`` to ``[..., d]``, in the base layer's output dtype."""
        if self.mixed_batch is not None:
            return self._row_by_row(h, *args, **kwargs)
        if self.training and h.requires_grad:
            quantised.refuse_training_through_packed(self.name, self.base_layer)
        adapters = self.adapters_at_work()
        if not adapters:
            return self.base_layer(h, *args, **kwargs)
        base = self.base_output(h, *args, **kwargs)
        if base.fresh and len(adapters) == 1:
            # Decoding, which feels every lookup: past the module's call, if nothing hooks it.
            adapter = adapters[0]
            hooked = adapter._forward_pre_hooks or adapter._forward_hooks
            return adapter(base) if hooked else adapter.forward(base)
        if torch.is_grad_enabled():  # whether or not train() was called
            take_means(self, adapters, base)
        return self._adapt(adapters, base)

    def base_output(self, h: Tensor, *args: Any, **kwargs: Any) -> BaseOutput:
        """The base layer's output.

        The product of a plain linear layer is without its bias, which the epilogue then adds: subtracting it again from
        a low-precision output would lose digits. Any other layer adds its bias itself, and so does the product where an
        adapter is centred, by a mean which contains the bias.
        """
        layer: Any = self._modules["base_layer"]
        if args or kwargs or not is_plain(layer):
            y0 = layer(h, *args, **kwargs)
            bias = sharding.local(getattr(self.get_base_layer(), "bias", None))
            return BaseOutput(y0, beside(bias, y0), bias is not None, self.columns(y0))
        # Past nn.Module's lookups, which decoding feels in every layer; those of an expert are views, held by no one.
        held = layer._parameters
        bias, weight = (held["bias"], held["weight"]) if len(held) == 2 else (layer.bias, layer.weight)
        y0 = F.linear(h, weight.t() if isinstance(layer, Conv1D) else weight, bias if self.centered else None)
        columns = None if y0.shape[-1] == self.out_features else self.columns(y0)
        fresh = h.is_cpu and undisturbed() and type(y0) is Tensor
        if bias is None:
            return BaseOutput(y0, None, False, columns, fresh)
        return BaseOutput(y0, beside(sharding.local(bias), y0), self.centered, columns, fresh)

    def columns(self, y0: Tensor) -> Columns | None:
        """Of a column-parallel layer those that ``y0`` has, None for any other: its output is whole."""
        return None if y0.shape[-1] == self.out_features else Columns(self.get_base_layer().weight)

    def _adapt(self, adapters: Sequence[Adapter], base: BaseOutput) -> Tensor:
        """Every adapter reads the base output, not what the one before it has made of it."""
        with nvtx.layer(self.name):
            if len(adapters) == 1:
                return adapters[0](base)
            base, y = base._replace(fresh=False), None
            for adapter in adapters:
                y = adapter(base, y)
            return y  # type: ignore[return-value]

    def _row_by_row(self, h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``h [batch, ..., d_in]`` to ``[batch, ..., d]``, every row as if it were run alone with its adapter."""
        if self.disable_adapters:  # as with PEFT's LoRA, that has precedence
            return self.base_layer(h, *args, **kwargs)
        self.refuse_merged()
        adapters, groups = self.idlora_adapter, self.mixed_batch.of(h)  # type: ignore[union-attr]
        if not any(name in adapters for name, _ in groups.slices):
            return self.base_layer(h, *args, **kwargs)
        base = self.base_output(h, *args, **kwargs)
        if not groups.sorted:
            order, inverse = groups.on(base.y0.device)
            base = base._replace(y0=base.y0.index_select(0, order))
        parts = []
        for name, rows in groups.slices:
            if name in adapters:
                parts.append(self._adapt([adapters[name]], base.rows(rows)))
            elif base.bias is None or base.contains_bias:
                parts.append(base.y0[rows])
            else:  # not y0 + bias, which is rounded once more than the base layer's own output
                parts.append(self.base_layer(h[rows] if groups.sorted else h.index_select(0, order[rows])))
        y = parts[0] if len(parts) == 1 else torch.cat(parts)
        return y if groups.sorted else y.index_select(0, inverse)

    def alpha(self, h: Tensor, adapter_name: str = "default") -> Tensor:
        """The router's weights for input ``h [..., d_in]``, ``[..., k]`` float32.

        ``a_i = <T_i, x_i>`` with ``x_i = A_i h`` (rows scaled if ``row_scale``, less its mean if ``center``); a
        bounded router's is that of :func:`idlora_ext.ops.bounded_router.weight` for all clusters, and a static router's
        do not depend on ``h``.
        """
        return self.idlora_adapter[adapter_name].alpha(self.base_output(h))

    def __repr__(self) -> str:
        return "idlora." + super().__repr__()
