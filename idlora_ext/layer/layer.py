"""What an adapted layer holds: the frozen layer, and adapters by name."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..base import quantised, sharding
from ..base.peft_internals import BaseTunerLayer
from ..base.weight import base_weight, is_quantised, linear_shape, parameter_dtype, stored
from ..rows.fingerprint import fingerprint
from .adapter import Adapter
from .config import IdLoraConfig, fit_rank
from .mixed_rows import MixedBatch


class IdLoraLayer(BaseTunerLayer):
    """A layer that returns ``h W^T + b``, and its adapters (arXiv 2602.20727, §4).

    ``idlora_adapter[name]`` is an :class:`~idlora_ext.layer.adapter.Adapter`. ``name`` is the layer's in its model, for
    messages and profilers.
    """

    adapter_layer_names = ("idlora_adapter",)

    name = "?"  # until the tuner gives it one
    on_this_rank_only = False  # the ranks hold different layers (pipeline stages)
    base_layer: nn.Module
    active_adapters: list[str]  # PEFT's property
    get_base_layer: Callable[[], Any]  # PEFT's method
    unmerged_weight: Tensor | None = None  # W without what is merged into it, while something is
    mixed_batch: MixedBatch | None = None  # while the rows of a batch have adapters of their own
    padding_mask: Tensor | None = None  # [batch, length], of the call in which a mean is to be taken

    def __init__(self, base_layer: nn.Module, quantization: dict[str, Any] | None = None) -> None:
        self.base_layer = base_layer
        self.idlora_adapter: Any = nn.ModuleDict()
        self.centered = False  # whether one of the adapters is
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        base = self.get_base_layer()
        self.in_features, self.out_features = linear_shape(base)
        self.quantization_backend = quantised.quantization_backend(base, quantization or {})

    def get_base_weight(self) -> Tensor:
        """``W [d, d_in]``, dequantised and gathered: all ranks must ask for a weight that is sharded over them.

        Without what is merged into it.
        """
        base = self.get_base_layer()
        if self.unmerged_weight is not None:
            return self.unmerged_weight.to(stored(base).device)
        weight = sharding.read_whole(stored(base), lambda: base_weight(base, self.quantization_backend))
        expected = (self.out_features, self.in_features)
        if weight.shape != expected:
            raise ValueError(f"its weight must have shape {list(expected)} to be read, got {list(weight.shape)}")
        return weight

    def update_layer(self, adapter_name: str, config: IdLoraConfig, num_clusters: int, wanted_rank: int) -> None:
        """Add an adapter: tensors of the rank that fits, its rows still to be chosen or loaded."""
        r = fit_rank(self.out_features, num_clusters, wanted_rank, config.rank_boost)
        base = self.get_base_layer()
        device, dtype = stored(base).device, parameter_dtype(base)
        sizes = self.out_features, num_clusters, r
        adapter = Adapter(adapter_name, config, *sizes, wanted_rank=wanted_rank, device=device, dtype=dtype)
        # Else with the rows, so that W is dequantised only once. Ranks that share out the rows compare it before.
        if config.index_stored or stored(base).is_meta or sharding.world_size() > 1:
            self._take_fingerprint(adapter, self.get_base_weight())
        self.idlora_adapter[adapter_name] = adapter.train(self.training)
        self.centered = self.centered or config.center
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.centered = any(adapter.mean is not None for adapter in self.idlora_adapter.values())

    def choose_rows(self, adapter_name: str, config: IdLoraConfig, name: str, weight: Tensor | None = None) -> None:
        """Choose rows of ``W`` for an adapter.

        ``name`` is the layer's, so that each layer has a seed of its own and the same one every time. ``weight`` is
        ``W`` if it has been read already.
        """
        weight = self.get_base_weight() if weight is None else weight
        self._take_fingerprint(self.idlora_adapter[adapter_name], weight)
        self.idlora_adapter[adapter_name].choose_rows(weight, config, zlib.crc32(name.encode(), config.seed))

    def _take_fingerprint(self, adapter: Adapter, weight: Tensor) -> None:
        base = self.get_base_layer()
        dtype = torch.uint8 if is_quantised(base, self.quantization_backend) else stored(base).dtype
        adapter.fingerprint = fingerprint(weight, dtype).to(adapter.index.device)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the device of ``W``, if it has one. PEFT's own would also round what is float32 beside bfloat16."""
        device = device or stored(self.get_base_layer()).device
        if device.type != "meta" and adapter_name in self.idlora_adapter:  # meta: offloaded
            self.idlora_adapter[adapter_name]._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))

    def adapters_at_work(self) -> list[Adapter]:
        """Those that ``forward`` runs, in the order in which they were activated."""
        if self._disable_adapters or self.merged_adapters:
            return []
        held: Any = self._modules["idlora_adapter"]._modules  # past nn.Module's lookups, which decoding feels
        active = self._active_adapter
        if isinstance(active, str):
            active = (active,)
        if len(active) == 1:
            return [held[active[0]]] if active[0] in held else []
        return [held[name] for name in active if name in held]

    def refuse_pending(self, adapter_names: Iterable[str]) -> None:
        """Refuse to run adapters without rows."""
        for name in adapter_names:
            if name in self.idlora_adapter:
                self.idlora_adapter[name].refuse_pending()

    def refuse_merged(self) -> None:
        """Refuse rows with adapters of their own while the weight holds some for all."""
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def set_scale(self, adapter: str, scale: float) -> None:
        """``scaling = scale * config.scaling`` for one adapter; nothing if the layer does not have it. As LoRA's."""
        if adapter in self.idlora_adapter:
            held = self.idlora_adapter[adapter]
            held.scaling = scale * held.configured_scaling

    def _active(self) -> list[Adapter]:
        return [self.idlora_adapter[name] for name in self.active_adapters if name in self.idlora_adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        for adapter in self._active():
            adapter.scaling *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters; with None return to the configured one."""
        for adapter in self._active():
            adapter.scaling = adapter.configured_scaling if scale is None else adapter.scaling / scale
