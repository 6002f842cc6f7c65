"""One adapter of one layer: a module that holds all it needs and computes ``y0 -> y``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops import bounded_router
from ..ops.column_parallel import Columns
from ..ops.fakes import accumulate
from ..ops.functional import adapt_in_place
from ..rows.fingerprint import SIZE as FINGERPRINT_SIZE
from ..rows.router_start import start_router
from ..rows.row_scale import row_scale
from ..rows.selection import select_rows
from .config import IdLoraConfig


class BaseOutput(NamedTuple):
    """What a base layer returned, and what has to be known of it."""

    y0: Tensor  # [..., d]
    bias: Tensor | None = None  # [d], the layer's
    contains_bias: bool = False  # whether y0 has it already
    columns: Columns | None = None  # of a column-parallel layer those that y0 has
    fresh: bool = False  # nobody else holds y0, and nothing but the result is wanted: it may be written over

    def rows(self, rows: slice) -> BaseOutput:
        """The same of some rows of the batch."""
        return self._replace(y0=self.y0[rows], fresh=False)


class Adapter(nn.Module):
    """``y = y0 + b + scaling * concat_j(B z^(j))``, ``z = sum_i a_i x_i``, ``x_ij = c_ij (y0 - o)[index_ij]``.

    ``a_i = <T_i, x_i>`` (the paper), a constant, or the weight of :func:`idlora_ext.ops.bounded_router.weight`. ``o``
    is the mean ``m`` of a centred adapter, else the bias if ``y0`` contains it. Source: arXiv 2602.20727, §4.

    Parameters and buffers, all of what an adapter is; a tensor that is registered here is saved, checked, moved and
    sent to other ranks:

    * ``B [d/s, r/s]``: starts at zero. ``router``: ``T``, ``[1, r]`` or ``[k, r]``; static: ``a``, ``[1]`` or ``[k]``;
    * ``index [k, r]`` int32: the chosen rows; -1 until they are;
    * ``row_scale [k, r]`` float32: ``c``, only with ``row_scale``;
    * ``mean [d]`` float32 (float64 if ``W`` is): ``m``, only with ``center``; zero until it has been taken;
    * ``fingerprint`` int32: what the base layer was.
    """

    def __init__(
        self,
        name: str,
        config: IdLoraConfig,
        d: int,
        k: int,
        r: int,
        *,
        wanted_rank: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.name = name
        self.wanted_rank = wanted_rank  # what was asked for; r may be smaller
        self.scaling = self.configured_scaling = config.scaling
        self.dropout = config.dropout  # on z
        self.bounded = config.router == "bounded"  # the shapes tell the other routers apart
        self.pending = True  # its rows are still to be chosen, or its tensors to come from a file
        self.mean_taken = not config.center

        s, rows = config.rank_boost, 1 if config.shared_router else k
        router = torch.ones(rows) if config.router == "static" else torch.zeros(rows, r)
        self.router = nn.Parameter(router.to(device, dtype))
        self.B = nn.Parameter(torch.zeros(d // s, r // s, device=device, dtype=dtype))

        def buffer(name: str, tensor: Tensor, wanted: bool = True) -> None:
            self.register_buffer(name, tensor.to(device) if wanted else None)

        buffer("index", torch.full((k, r), -1, dtype=torch.int32))
        buffer("fingerprint", torch.zeros(FINGERPRINT_SIZE, dtype=torch.int32))
        buffer("row_scale", torch.ones(k, r), config.row_scale)
        buffer("mean", torch.zeros(d, dtype=accumulate(dtype)), config.center)

    index: Tensor
    fingerprint: Tensor
    row_scale: Tensor | None
    mean: Tensor | None

    # ---- y0 -> y -----------------------------------------------------------------------------------------------------

    def forward(self, base: BaseOutput, y: Tensor | None = None) -> Tensor:
        """``y [..., d]``; the update is added to ``y0``, or to ``y``, what other adapters have made of it."""
        if self.pending:
            self.refuse_pending()
        if y is not None or base.columns is not None or (self.training and self.dropout):
            return self._by_operator(base, y)
        if base.fresh:
            adapt_in_place(base.y0, *self._arguments(base))
            return base.y0
        return ops.adapt(base.y0, *self._arguments(base))

    def _by_operator(self, base: BaseOutput, y: Tensor | None) -> Tensor:
        _, router, B, offset, scaling, contained, _, bounded = self._arguments(base)
        z = F.dropout(ops.rb_scale(self.gather(base), router, bounded), self.dropout, self.training)
        added = None if contained or y is not None else offset
        return (base.columns or ops).shared_gemm(base.y0 if y is None else y, z, B, added, scaling)

    def gather(self, base: BaseOutput) -> Tensor:
        """``x [..., k, r]`` in the dtype of ``y0``."""
        index, _, _, offset, _, contained, scale, _ = self._arguments(base)
        gather = ops.cluster_gather if base.columns is None else base.columns.gather
        return gather(base.y0, index, offset if contained else None, scale)

    def _arguments(self, base: BaseOutput) -> tuple[Any, ...]:
        """What ``ops.adapt`` takes beside ``y0``; to a centred adapter the mean is what ``y0`` contains."""
        # Past nn.Module's lookups, which decoding feels in every layer; a replica of nn.DataParallel has no parameters,
        # but plain tensors.
        held: Any = self._parameters or vars(self)
        buffers: Any = self._buffers
        y0, offset, contained, columns, _ = base
        router, B, scale, mean = held["router"], held["B"], buffers["row_scale"], buffers["mean"]
        dtype, wide = y0.dtype, torch.float32
        if router.dtype is not dtype and router.dtype is not wide:
            router, B = router.to(dtype), B.to(dtype)  # a base layer that computes wider than the adapter is stored
        if scale is not None and scale.dtype is not wide:
            scale = scale.float()  # whatever the model was converted to
        if mean is not None:
            offset, contained = mean if mean.dtype is dtype else beside(mean, y0), True
            if columns is not None:
                offset = offset[columns.first : columns.last]
        return buffers["index"], router, B, offset, self.scaling, contained, scale, self.bounded

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """``index``, router and ``B`` as the operators take them beside activations of ``dtype``."""
        index, router, B, *_ = self._arguments(BaseOutput(torch.empty(0, dtype=dtype)))
        return index, router, B

    def alpha(self, base: BaseOutput) -> Tensor:
        """The router's weights ``a_i``, ``[..., k]`` float32."""
        router = self.router.float()
        if self.is_static:
            return router.expand(*base.y0.shape[:-1], len(self.index))
        x = self.gather(base).float()
        if self.bounded:
            return bounded_router.weight(x.sum(-2), router).unsqueeze(-1).expand(x.shape[:-1])
        return (x * router).sum(-1)

    # ---- as a LoRA ---------------------------------------------------------------------------------------------------

    @property
    def is_static(self) -> bool:
        """Whether ``a_i`` are constants: the update is then one matrix of rank ``r``."""
        return self.router.ndim == 1

    @torch.no_grad()
    def lora_factors(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """``A = sum_i a_i diag(c_i) W[index_i] [r, d_in]``, ``scaling * B [d/s, r/s]`` and, of a centred adapter, the
        ``c = sum_i a_i c_i (b - m)[index_i] [r]`` of ``z = A h + c``, else None; float32 (float64 if ``W`` is).

        Args:
            W: ``[d, d_in]``; b: the layer's bias ``[d]``, or None. The router must be static.
        """
        index, dtype = self.index.long(), accumulate(W.dtype)
        a = self.router.to(dtype).expand(len(index)).unsqueeze(-1)
        if self.row_scale is not None:
            a = a * self.row_scale.to(dtype)
        A = torch.zeros(index.shape[1], W.shape[1], dtype=dtype, device=W.device)
        for a_i, rows in zip(a, index, strict=True):
            A.addcmul_(W[rows].to(dtype), a_i.unsqueeze(-1))
        c = None
        if self.mean is not None:
            m = self.mean.to(dtype)
            c = (a * (-m if b is None else b.to(dtype) - m)[index]).sum(0)
        return A, self.scaling * self.B.to(dtype), c

    # ---- where its tensors come from ---------------------------------------------------------------------------------

    @torch.no_grad()
    def choose_rows(self, W: Tensor, config: IdLoraConfig, seed: int) -> None:
        """Choose rows of ``W`` (and their scales), and start a linear router; ``B`` stays zero."""
        k, r = self.index.shape
        self.index = select_rows(W, k, r, selection=config.selection, seed=seed)
        if self.row_scale is not None:
            self.row_scale = row_scale(W, self.index)
        if config.router == "linear":
            start_router(self.router, W, self.index, seed, self.row_scale)
        self.pending = False

    def chosen(self) -> dict[str, Tensor]:
        """All tensors but ``B``, on the CPU: what another rank needs to have the same adapter."""
        return {name: tensor.cpu() for name, tensor in self.state_dict().items() if name != "B"}

    def receive(self, chosen: Mapping[str, Tensor], device: torch.device | str) -> None:
        """Take over what another rank has chosen; a ``B`` on the meta device becomes zeros."""
        for name, tensor in chosen.items():
            self._put(name, tensor.to(device))
        if self.B.is_meta:
            self._put("B", torch.zeros_like(self.B, device=device))
        self.pending = False

    def check(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Refuse what cannot be these tensors. ``where`` is put before their names.

        Raises:
            ValueError: naming the tensor, what it must be and what it is.
        """
        for name, expected in self.state_dict().items():
            tensor = tensors[name]
            if tensor.shape != expected.shape:
                raise ValueError(
                    f"{where}{name}: the file has shape {list(tensor.shape)}, the model {list(expected.shape)}"
                )
            if tensor.dtype.is_floating_point != expected.dtype.is_floating_point:
                raise ValueError(f"{where}{name}: the file has {tensor.dtype}, the model {expected.dtype}")
        index, d = tensors["index"].flatten().long(), self.B.shape[0] * (self.index.shape[1] // self.B.shape[1])
        if index.min() < 0 or index.max() >= d:
            raise ValueError(f"{where}index: entries must lie in [0, {d}), got {index.min()} to {index.max()}")
        if index.unique().numel() != index.numel():
            raise ValueError(f"{where}index: entries must be distinct, and some occur more than once")
        scale = tensors.get("row_scale")
        if scale is not None and not (scale.isfinite() & (scale >= 0)).all():
            raise ValueError(f"{where}row_scale: entries must be finite and not negative")
        if "mean" in tensors and not tensors["mean"].isfinite().all():
            raise ValueError(f"{where}mean: entries must be finite")

    def accept(self, tensors: Mapping[str, Tensor]) -> None:
        """Get ready for the tensors of a file, which are about to be copied into these: in the file's dtypes if the
        adapter is new. They have been checked.
        """
        for name, parameter in list(self._parameters.items()) if self.pending else ():
            if parameter is not None and parameter.dtype != tensors[name].dtype:
                self._put(name, parameter.data.to(tensors[name].dtype))
        self.pending = False
        self.mean_taken = self.mean is None  # of one that was saved before its first step the mean is to be taken

    def refuse_pending(self) -> None:
        """Refuse to run without rows.

        Raises:
            ValueError: they were to come from a file, which was never loaded.
        """
        if self.pending and not self.index.is_meta:
            raise ValueError(
                f"adapter {self.name!r} was made from a saved configuration (index_stored=True), but its tensors "
                "were never loaded. Load its file (PeftModel.from_pretrained, model.load_adapter, "
                "idlora_ext.load), remove the adapter (idlora_ext.remove), or set config.index_stored = False to "
                "choose rows for this model."
            )

    def _put(self, name: str, tensor: Tensor) -> None:
        """Replace a tensor by one of another dtype or device."""
        if (parameter := self._parameters.get(name)) is not None:
            tensor = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
        setattr(self, name, tensor)


def beside(bias: Tensor | None, y0: Tensor) -> Any:
    """A vector in a dtype that the operators take beside ``y0``: its own, or the one they add up in."""
    if bias is None or bias.dtype is y0.dtype or bias.dtype is accumulate(y0.dtype):
        return bias
    return bias.to(y0.dtype)
