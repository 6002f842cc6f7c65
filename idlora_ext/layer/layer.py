"""The adapted layer: a frozen linear layer whose output passes through :func:`idlora_ext.ops.adapt`."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .. import ops
from ..base import quantised, sharding
from ..base.experts import ExpertLinear
from ..base.peft_internals import BufferDict
from ..base.weight import base_weight, is_plain, is_quantised, linear_shape, parameter_dtype, stored
from ..ops import bounded_router, column_parallel, nvtx
from ..ops.fakes import accumulate
from ..ops.functional import transformed
from ..rows.fingerprint import SIZE as FINGERPRINT_SIZE
from ..rows.fingerprint import fingerprint
from ..rows.router_start import start_router
from ..rows.row_scale import row_scale
from ..rows.selection import select_rows
from . import centering
from .config import IdLoraConfig, fit_rank
from .decoding import infer
from .merging import MergeableLayer
from .mixed_rows import MixedBatch


class IdLoraLayer(MergeableLayer):
    """What every adapted layer holds, by adapter name (arXiv 2602.20727, §4).

    ``idlora_index``: ``[k, r]`` int32 buffer, the chosen rows. ``idlora_router``: ``T``, ``[1, r]`` or ``[k, r]``;
    static: ``a``, ``[1]`` or ``[k]``.
    ``idlora_B``: ``[d/s, r/s]``, starts at zero. ``idlora_fingerprint``: int32 buffer, what the base layer was.
    ``idlora_row_scale``: ``[k, r]`` float32 buffer, only of adapters with ``row_scale``.
    ``idlora_mean``: ``m [d]`` float32 (float64 if ``W`` is) buffer, only of adapters with ``center``; zero until it has
    been taken.
    ``name`` is the layer's in its model, for profilers.
    """

    adapter_layer_names = ("idlora_router", "idlora_B")
    other_param_names = (
        "idlora_index",
        "idlora_fingerprint",
        "idlora_row_scale",
        "idlora_mean",
        "centered",
        "bounded",
        "scaling",
        "configured_scaling",
        "dropout",
        "wanted_rank",
    )

    name = "?"  # until the tuner gives it one
    on_this_rank_only = False  # the ranks hold different layers (pipeline stages)
    base_layer: nn.Module
    active_adapters: list[str]  # PEFT's property
    tensors_held: tuple[dict[str, Any], ...] | None = None  # see decoding.py
    mixed_batch: MixedBatch | None = None  # while the rows of a batch have adapters of their own
    padding_mask: Tensor | None = None  # [batch, length], of the call in which a mean is to be taken

    def __init__(self, base_layer: nn.Module, quantization: dict[str, Any] | None = None) -> None:
        self.base_layer = base_layer
        self.idlora_index = BufferDict(persistent=True)
        self.idlora_router = nn.ParameterDict()
        self.idlora_B = nn.ParameterDict()
        self.idlora_fingerprint = BufferDict(persistent=True)
        self.idlora_row_scale = BufferDict(persistent=True)
        self.idlora_mean = BufferDict(persistent=True)
        self.centered: dict[str, bool] = {}  # of those that have one, whether the mean is known to have been taken
        self.bounded: dict[str, bool] = {}  # whether the router is; the shapes tell the others apart
        self.scaling: dict[str, float] = {}
        self.configured_scaling: dict[str, float] = {}  # what set_scale multiplies and unscale_layer returns to
        self.dropout: dict[str, float] = {}
        self.wanted_rank: dict[str, int] = {}
        self.pending: set[str] = set()  # adapters whose tensors are still to come from a file
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
        weight = sharding.whole(stored(base), lambda: base_weight(base, self.quantization_backend))
        expected = (self.out_features, self.in_features)
        if weight.shape != expected:
            raise ValueError(f"its weight must have shape {list(expected)} to be read, got {list(weight.shape)}")
        return weight

    def update_layer(self, adapter_name: str, config: IdLoraConfig, num_clusters: int, wanted_rank: int) -> None:
        """Add an adapter: tensors of the rank that fits, its rows still to be chosen or loaded."""
        r = fit_rank(self.out_features, num_clusters, wanted_rank, config.rank_boost)
        k, s, d = num_clusters, config.rank_boost, self.out_features
        base = self.get_base_layer()
        device, dtype = stored(base).device, parameter_dtype(base)
        fixed: dict[str, Any] = {"device": device, "dtype": torch.int32}
        self.idlora_index[adapter_name] = torch.full((k, r), -1, **fixed)
        self.idlora_fingerprint[adapter_name] = torch.zeros(FINGERPRINT_SIZE, **fixed)
        # Else with the rows, so that W is dequantised only once. Ranks that share out the rows compare it before.
        if config.index_stored or stored(base).is_meta or sharding.world_size() > 1:
            self._take_fingerprint(adapter_name, self.get_base_weight())
        if config.row_scale:
            self.idlora_row_scale[adapter_name] = torch.ones(k, r, device=device)
        if config.center:
            self.idlora_mean[adapter_name] = torch.zeros(d, device=device, dtype=accumulate(dtype))
            self.centered[adapter_name] = False
        self.bounded[adapter_name] = config.router == "bounded"
        rows = 1 if config.shared_router else k
        router = torch.ones(rows) if config.router == "static" else torch.zeros(rows, r)
        self.idlora_router[adapter_name] = nn.Parameter(router.to(device, dtype))
        self.idlora_B[adapter_name] = nn.Parameter(torch.zeros(d // s, r // s, device=device, dtype=dtype))
        self.scaling[adapter_name] = self.configured_scaling[adapter_name] = config.scaling
        self.dropout[adapter_name] = config.dropout
        self.wanted_rank[adapter_name] = wanted_rank
        self.pending.add(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def choose_rows(self, adapter_name: str, config: IdLoraConfig, name: str, weight: Tensor | None = None) -> None:
        """Choose rows of ``W`` (and their scales), and start the router (``B`` stays zero, and a bounded router too).

        ``name`` is the layer's, so that each layer has a seed of its own and the same one every time. ``weight`` is
        ``W`` if it has been read already.
        """
        index = self.idlora_index[adapter_name]
        k, r = index.shape
        seed = zlib.crc32(name.encode(), config.seed)
        weight = self.get_base_weight() if weight is None else weight
        self._take_fingerprint(adapter_name, weight)
        self.idlora_index[adapter_name] = index = select_rows(weight, k, r, selection=config.selection, seed=seed)
        scale = None
        if config.row_scale:
            self.idlora_row_scale[adapter_name] = scale = row_scale(weight, index)
        if config.router == "linear":
            start_router(self.idlora_router[adapter_name], weight, index, seed, scale)
        self.pending.discard(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the device of ``W``, if it has one. PEFT's own would also round what is float32 beside bfloat16."""
        device = device or stored(self.get_base_layer()).device
        if device.type == "meta":  # offloaded
            return
        for parameters in (self.idlora_router, self.idlora_B):
            if adapter_name in parameters and not parameters[adapter_name].is_meta:
                parameters[adapter_name].data = parameters[adapter_name].data.to(device)
        for buffers in (self.idlora_index, self.idlora_fingerprint, self.idlora_row_scale, self.idlora_mean):
            if adapter_name in buffers and not buffers[adapter_name].is_meta:
                buffers[adapter_name] = buffers[adapter_name].to(device)

    def _take_fingerprint(self, adapter_name: str, weight: Tensor) -> None:
        base = self.get_base_layer()
        dtype = torch.uint8 if is_quantised(base, self.quantization_backend) else stored(base).dtype
        device = self.idlora_index[adapter_name].device
        self.idlora_fingerprint[adapter_name] = fingerprint(weight, dtype).to(device)

    def alpha(self, h: Tensor, adapter_name: str = "default") -> Tensor:
        """The router's weights for input ``h [..., d_in]``, ``[..., k]`` float32.

        ``a_i = <T_i, x_i>`` with ``x_i = A_i h`` (rows scaled if ``row_scale``, less its mean if ``center``); a
        bounded router's is that of :func:`idlora_ext.bounded_router.weight` for all clusters, and a static router's do
        not depend on ``h``.
        """
        if self.is_static(adapter_name):
            k = len(self.idlora_index[adapter_name])
            return self.idlora_router[adapter_name].float().expand(*h.shape[:-1], k)
        y0, bias, bias_in_y0 = self._base_output(h)
        x = self._gather(y0, self._columns(y0), adapter_name, bias if bias_in_y0 else None).float()
        router = self.idlora_router[adapter_name].float()
        if self.bounded[adapter_name]:
            return bounded_router.weight(x.sum(-2), router).unsqueeze(-1).expand(x.shape[:-1])
        return (x * router).sum(-1)

    def _base_output(self, h: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None, bool]:
        """``y0``, the layer's bias, and whether ``y0`` contains it.

        The product of a plain linear layer is without its bias, which the epilogue then adds: subtracting it again from
        a low-precision output would lose digits. Any other layer adds its bias itself, and so does the product where an
        adapter is centred, by a mean which contains the bias.
        """
        layer: Any = self._modules["base_layer"]
        if not (args or kwargs) and is_plain(layer):
            return self.product(layer, h)
        bias = sharding.local(getattr(self.get_base_layer(), "bias", None))
        y0 = layer(h, *args, **kwargs)
        return y0, _beside(bias, y0), bias is not None

    def product(self, layer: Any, h: Tensor) -> tuple[Tensor, Tensor | None, bool]:
        """:meth:`_base_output` of a plain layer."""
        # Past nn.Module's lookups, which decoding feels in every layer; those of an expert are views, held by no one.
        held = layer._parameters
        bias, weight = (held["bias"], held["weight"]) if len(held) == 2 else (layer.bias, layer.weight)
        if isinstance(layer, Conv1D):
            weight = weight.t()
        y0 = F.linear(h, weight, bias if self.centered else None)
        if bias is None:
            return y0, None, False
        return y0, _beside(sharding.local(bias), y0), bool(self.centered)

    @torch.no_grad()
    def _take_mean(self, adapters: Iterable[str], y0: Tensor) -> None:
        """Take ``m`` from the first batch of training, while ``B`` is zero: what the layer returns does not change."""
        for adapter in adapters:
            B = self.idlora_B[adapter]
            if self.centered.get(adapter, True) or not B.requires_grad or not y0.numel():
                continue
            mean = self.idlora_mean[adapter]
            if transformed():
                if mean.any():  # it is from a file
                    continue
                self._refuse_mean(adapter, "a transform (torch.func, forward-mode) may not change a buffer")
            taken = mean.any() | B.any()  # it is from a file, however that was loaded
            if sharding.world_size() == 1 or not (self.on_this_rank_only or isinstance(self.base_layer, ExpertLinear)):
                # No branch on what a tensor holds: it would wait for the device, and keep a compiler from one graph.
                of_batch = centering.mean_over_tokens(y0, self._columns(y0), self.out_features, self.padding_mask)
                mean.copy_(torch.where(taken, mean, of_batch))
            elif not taken:
                self._refuse_mean(adapter, "not all ranks call this layer, and they would wait for one another")
            self.centered[adapter] = True
        self.padding_mask = None

    def _refuse_mean(self, adapter: str, why: str) -> NoReturn:
        raise ValueError(
            f"layer {self.name!r}: adapter {adapter!r} is to be centred by the mean over the first batch, but {why}. "
            "Call idlora_ext.calibrate(model, batches) before training (on every rank), or use center=False."
        )

    def refuse_pending(self, adapters: Iterable[str]) -> None:
        """Refuse to run adapters without rows."""
        for adapter in adapters:
            if adapter in self.pending and not self.idlora_index[adapter].is_meta:
                raise ValueError(
                    f"adapter {adapter!r} was made from a saved configuration (index_stored=True), but its tensors "
                    "were never loaded. Load its file (PeftModel.from_pretrained, model.load_adapter, "
                    "idlora_ext.load), remove the adapter (idlora_ext.remove), or set config.index_stored = False to "
                    "choose rows for this model."
                )

    def _columns(self, y0: Tensor) -> column_parallel.Columns | None:
        """Of a column-parallel layer those that ``y0`` has, None for any other: its output is whole."""
        if y0.shape[-1] == self.out_features:
            return None
        return column_parallel.Columns(self.get_base_layer().weight)

    def _offset(
        self, y0: Tensor, columns: column_parallel.Columns | None, adapter: str, bias: Tensor | None
    ) -> Tensor | None:
        """What is subtracted from the columns of ``y0`` that are gathered: ``m``, or the bias that ``y0`` contains."""
        mean = _beside(self._modules["idlora_mean"]._buffers.get(adapter), y0)
        if mean is None:
            return bias
        return mean if columns is None else mean[columns.first : columns.last]

    def _gather(self, y0: Tensor, columns: column_parallel.Columns | None, adapter: str, bias: Tensor | None) -> Tensor:
        """``x [..., k, r]``, ``x_ij = c_ij (y0 - o)[index_ij]``, ``o`` the offset, in the dtype of ``y0``."""
        gather = ops.cluster_gather if columns is None else columns.gather
        return gather(y0, self.idlora_index[adapter], self._offset(y0, columns, adapter, bias), self._scale(adapter))

    def _scale(self, adapter: str) -> Tensor | None:
        """``c [k, r]`` of an adapter with ``row_scale``, float32 whatever the model was converted to."""
        scale: Tensor | None = self._modules["idlora_row_scale"]._buffers.get(adapter)
        return None if scale is None else scale.float()

    def set_scale(self, adapter: str, scale: float) -> None:
        """``scaling = scale * config.scaling`` for one adapter; nothing if the layer does not have it. As LoRA's."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.configured_scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        for adapter in self._active_here():
            self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters; with None return to the configured one."""
        for adapter in self._active_here():
            self.scaling[adapter] = self.configured_scaling[adapter] if scale is None else self.scaling[adapter] / scale

    def _active_here(self) -> list[str]:
        held, active = self._modules["idlora_B"]._parameters, self._active_adapter
        if isinstance(active, str):
            return [active] if active in held else []
        return [adapter for adapter in active if adapter in held]


class Linear(nn.Module, IdLoraLayer):
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
        IdLoraLayer.__init__(self, base_layer, quantization)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, num_clusters, wanted_rank)

    def forward(self, h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``h [..., d_in]`` to ``[..., d]``, in the base layer's output dtype."""
        if h.is_cpu and not (torch.is_grad_enabled() or args or kwargs) and (y := infer(self, h)) is not None:
            return y
        if self.mixed_batch is not None:
            return self.mixed_batch.forward(self, h, *args, **kwargs)
        if self.training and h.requires_grad:
            quantised.refuse_training_through_packed(self.name, self.base_layer)
        adapters = [] if self._disable_adapters or self.merged_adapters else self._active_here()
        if not adapters:
            return self.base_layer(h, *args, **kwargs)
        if self.pending:
            self.refuse_pending(adapters)
        y0, bias, bias_in_y0 = self._base_output(h, *args, **kwargs)
        if torch.is_grad_enabled() and not all(self.centered.values()):  # whether or not train() was called
            self._take_mean(adapters, y0)
        return self.adapt(adapters, y0, bias, bias_in_y0)

    def adapt(self, adapters: list[str], y0: Tensor, bias: Tensor | None, bias_in_y0: bool) -> Tensor:
        """What the layer returns, of what :meth:`_base_output` has returned."""
        adapter = adapters[0]
        with nvtx.layer(self.name):
            if len(adapters) > 1 or not self._fused(adapter) or y0.shape[-1] != self.out_features:
                return self._by_operator(adapters, y0, bias, bias_in_y0)
            return ops.adapt(y0, *self._arguments(adapter, y0, bias, bias_in_y0))

    def _fused(self, adapter: str) -> bool:
        """Whether ``ops.adapt`` does all that an adapter asks for."""
        return not (self.training and self.dropout[adapter])

    def _by_operator(self, adapters: list[str], y0: Tensor, bias: Tensor | None, bias_in_y0: bool) -> Tensor:
        columns = self._columns(y0)
        y = y0
        added = None if bias_in_y0 else bias
        for adapter in adapters:  # each adapter reads the base output, not the one before it
            _, router, B = self._tensors(adapter, y0.dtype)
            x = self._gather(y0, columns, adapter, bias if bias_in_y0 else None)
            z = F.dropout(ops.rb_scale(x, router, self.bounded[adapter]), self.dropout[adapter], self.training)
            y = (columns or ops).shared_gemm(y, z, B, added, self.scaling[adapter])
            added = None
        return y

    def _arguments(self, adapter: str, y0: Tensor, bias: Tensor | None, bias_in_y0: bool) -> tuple[Any, ...]:
        """Those of ``ops.adapt`` beside ``y0``; of a centred adapter the mean is what ``y0`` contains."""
        held: Any = self._modules["idlora_mean"]
        mean = _beside(held._buffers.get(adapter), y0)
        if mean is not None:
            bias, bias_in_y0 = mean, True
        options = self.scaling[adapter], bias_in_y0, self._scale(adapter), self.bounded[adapter]
        return *self._tensors(adapter, y0.dtype), bias, *options

    def _tensors(self, adapter: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        held: Any = self._modules
        router, B = held["idlora_router"]._parameters[adapter], held["idlora_B"]._parameters[adapter]
        if router.dtype not in (dtype, torch.float32):  # a base layer that computes wider than the adapter is stored
            router, B = router.to(dtype), B.to(dtype)
        return held["idlora_index"]._buffers[adapter], router, B

    def __repr__(self) -> str:
        return "idlora." + super().__repr__()


def _beside(bias: Tensor | None, y0: Tensor) -> Tensor | None:
    """The bias in a dtype that the operators take beside ``y0``: its own, or the one they add up in."""
    if bias is None or bias.dtype == y0.dtype or bias.dtype == accumulate(y0.dtype):
        return bias
    return bias.to(y0.dtype)
