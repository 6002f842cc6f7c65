"""``IdLoraConfig``: the settings of one adapter, in PEFT's shape."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, get_args

from peft import LoraConfig, PeftConfig, PeftType

from ..base.peft_internals import get_pattern_key
from ..rows.selection import Selection

Router = Literal["linear", "bounded", "static"]

RankFit = Literal["shrink", "error"]

BaseMismatch = Literal["error", "warn"]

Preset = Literal["paper"]

# What a preset stands for: the method, which an argument may not contradict, and sizes, which one may replace.
_METHODS: dict[str, dict[str, Any]] = {
    "paper": {"router": "linear", "shared_router": True, "selection": "nearest", "row_scale": False, "center": False},
}

_SIZES: dict[str, dict[str, Any]] = {"paper": {"r": 128, "num_clusters": 4, "rank_boost": 2, "scaling": 1.0}}

FORMAT_VERSION = 1  # of adapter files: which tensors there are, what they mean, and how they are called


def settings(preset: Preset | None, given: dict[str, Any]) -> dict[str, Any]:
    """The fields that a preset stands for, with what is given beside it.

    Raises:
        ValueError: there is no such preset, or an argument contradicts its method.
    """
    if preset is None:
        return given
    if preset not in _METHODS:
        raise ValueError(f"IdLoraConfig: preset must be one of {', '.join(_METHODS)}, got {preset!r}")
    for name, value in _METHODS[preset].items():
        if given.get(name, value) != value:
            raise ValueError(
                f"IdLoraConfig: preset={preset!r} means {name}={value!r}, got {given[name]!r}: leave one out"
            )
    return _SIZES[preset] | given | _METHODS[preset]


def _with_presets(cls: type[IdLoraConfig]) -> type[IdLoraConfig]:
    """Let the class take a preset. It yields to what is given, and only here is that told apart from a default."""
    fields_alone: Any = cls.__init__

    @functools.wraps(fields_alone)
    def init(self: IdLoraConfig, *args: Any, preset: Preset | None = None, **given: Any) -> None:
        fields_alone(self, *args, **settings(preset, given))

    cls.__init__ = init  # type: ignore[method-assign]
    return cls


@_with_presets
@dataclass
class IdLoraConfig(PeftConfig):
    """Settings of an ID-LoRA adapter: ``y = y0 + scaling * concat_j(B z^(j))``, ``z = sum_i a_i x_i``, where the router
    gives ``a_i`` and ``x_i = A_i h`` are products with chosen rows of ``W``; the paper's ``a_i`` is ``<T_i, x_i>``.

    Source: arXiv 2602.20727, §4; sizes are those of the paper's multi-task setting, router, centring and choice of rows
    what learned best in benchmarks/REPORT.md, of what can be merged. A layer of ``d`` outputs gets
    ``d * r / rank_boost^2`` trainable values for ``B`` and 1 (or ``num_clusters``) for the router, of another form
    ``r`` (or ``num_clusters * r``).

    Args:
        r: rank: rows per cluster. Must be a multiple of ``rank_boost``.
        num_clusters: ``k``. ``k * r`` rows are chosen, so a layer needs ``d >= k * r`` (see ``rank_fit``).
        rank_boost: ``s``: ``B`` is ``[d/s, r/s]`` and is used ``s`` times. 1 is the paper's "without RB".
        scaling: sigma, a plain factor on the update. The paper has none, so 1.0.
        router: ``"static"``: ``a_i`` are learned constants that start at 1: the update is then a matrix of rank ``r``,
            which can be merged into ``W`` or exported as a LoRA. ``"linear"`` (the paper): ``a_i = <T_i, x_i>``.
            ``"bounded"``: from ``T = 0`` one weight a token, ``a = 1 + tanh(4 <T, u / rms(u)>)``, ``u = sum_i x_i``:
            the direction of ``u`` decides, and outlier tokens are not amplified. Needs ``shared_router``.
        shared_router: one vector ``T`` for all clusters, as the paper writes it, instead of one for each; of a static
            router one constant, with which only ``sum_i x_i`` is kept for the backward pass, instead of each ``x_i``.
        selection: which rows become ``A_i = W[index_i]``: ``"pivoted_qr_whole"``: the first ``k * r`` pivots of a
            column-pivoted QR of ``W^T``, an interpolative decomposition, dealt out to ``k`` groups; ``"pivoted_qr"``:
            of each cluster ``W_i`` the first pivots of ``W_i^T``; ``"nearest"`` to each centroid (the paper), or its
            ablations ``"sequential"`` and ``"random"``. See :func:`idlora_ext.rows.selection.select_rows`.
        row_scale: ``x_ij = c_ij W[index_ij] h``, ``c_ij`` the median norm of the rows of ``W`` over that of this row:
            rows count by direction, not by length, which matters most where pivoting picks the outliers. The scale is
            saved with the adapter. False: the paper's.
        center: ``x_i = (y0 - m)[index_i]``, ``m`` the mean of the base output ``y0`` over tokens: what all tokens share
            is taken out of the products. ``m`` is taken from the first forward pass with gradients, or by
            :func:`idlora_ext.calibrate`, and saved with the adapter; tokens that an ``attention_mask [batch, length]``
            masks do not count. Merging then changes biases too, which layers without one get; with False (the paper)
            it changes ``W`` alone.
        dropout: probability of zeroing entries of ``z`` while training.
        seed: of the clustering, the random selection, the sketch of a pivoted QR and a linear router's start. Each
            layer derives its own from its name.
        rank_fit: ``"shrink"`` gives a layer too narrow for ``k * r`` rows the largest rank that fits and says so once;
            ``"error"`` refuses.
        rank_pattern: rank by layer name or regular expression, where it differs from ``r``.
        clusters_pattern: number of clusters by layer name or regular expression, where it differs from
            ``num_clusters``.
        target_modules: names, or a regular expression, or ``"all-linear"``: every linear layer but the output head.
        exclude_modules: names, or a regular expression, of layers to leave alone.
        layers_to_transform: indices of the transformer layers to adapt; all by default.
        layers_pattern: name of the list of layers that ``layers_to_transform`` indexes, if it is not obvious.
        modules_to_save: further modules to train and save in full, such as a new classification head.
        trainable_token_indices: tokens whose embeddings are trained too: ids, or ids by the name of an embedding, as
            TRL asks for where a chat template adds tokens.
        index_stored: the rows are in the adapter's file and are never chosen again. True in a configuration that was
            saved; set it to False to use such a one for a fresh adapter.
        format_version: of the adapter's file. One that is newer than this package is refused.
        base_mismatch: what loading does when a base layer is not the one the adapter was made from: ``"error"``, or
            ``"warn"``. An attribute to set, not an argument, and never in a file: only who loads may relax it.
        preset: ``"paper"``: the paper's own setting, whatever the defaults are: ``router="linear"``,
            ``shared_router=True``, ``selection="nearest"``, ``row_scale=False``, ``center=False``, and unless they are
            given ``r=128``, ``num_clusters=4``, ``rank_boost=2``, ``scaling=1.0``. An argument only; the file has what
            it stands for.

    Raises:
        ValueError, TypeError: on a value out of its range, or one that contradicts the preset, naming the field.
    """

    r: int = field(default=128, metadata={"help": "Rank: rows per cluster."})
    num_clusters: int = field(default=4, metadata={"help": "Number of row clusters k."})
    rank_boost: int = field(default=2, metadata={"help": "Rank-boost factor s: B is [d/s, r/s], used s times."})
    scaling: float = field(default=1.0, metadata={"help": "Factor on the update."})
    router: Router = field(default="static", metadata={"help": "Form of the router."})
    shared_router: bool = field(default=True, metadata={"help": "One router vector for all clusters."})
    selection: Selection = field(default="pivoted_qr_whole", metadata={"help": "How rows are chosen."})
    row_scale: bool = field(default=True, metadata={"help": "Give all chosen rows one norm."})
    center: bool = field(default=True, metadata={"help": "Take out of x what all tokens share."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on z."})
    seed: int = field(default=0, metadata={"help": "Seed of clustering, selection and router start."})
    rank_fit: RankFit = field(default="shrink", metadata={"help": "What to do with layers narrower than k * r."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Rank by layer name or pattern."})
    clusters_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Number of clusters by layer name or pattern."}
    )
    target_modules: list[str] | set[str] | str | None = field(
        default="all-linear", metadata={"help": "Layers to adapt: names, a regular expression, or 'all-linear'."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Layers to leave alone: names or a regular expression."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the transformer layers to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers that layers_to_transform indexes."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save in full."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embeddings are trained too."}
    )
    index_stored: bool = field(default=False, metadata={"help": "The chosen rows are in the adapter's file."})
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Format of the adapter's file."})
    base_mismatch: BaseMismatch = field(
        default="error", init=False, metadata={"help": "On loading onto another base layer."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.IDLORA
        self._require("format_version", "an integer >= 1", _is_int(self.format_version) and self.format_version >= 1)
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"the adapter was saved by a newer idlora_ext, in format {self.format_version}; this one reads "
                f"formats up to {FORMAT_VERSION}. Upgrade: pip install --upgrade idlora_ext."
            )
        for name in ("r", "num_clusters", "rank_boost"):
            self._require(name, "an integer >= 1", _is_int(getattr(self, name)) and getattr(self, name) >= 1)
        self._require("seed", "an integer >= 0", _is_int(self.seed) and self.seed >= 0)
        self._require("r", f"a multiple of rank_boost = {self.rank_boost}", self.r % self.rank_boost == 0)
        self._require("scaling", "a number", isinstance(self.scaling, (int, float)))
        self.scaling = float(self.scaling)
        self._require("dropout", "a number in [0, 1)", isinstance(self.dropout, (int, float)) and 0 <= self.dropout < 1)
        for name, choices in (
            ("router", Router),
            ("selection", Selection),
            ("rank_fit", RankFit),
        ):
            self._require(name, "one of " + ", ".join(get_args(choices)), getattr(self, name) in get_args(choices))
        for name in ("shared_router", "row_scale", "center"):
            self._require(name, "True or False", isinstance(getattr(self, name), bool))
        if self.router == "bounded":
            self._require("shared_router", "True with router='bounded', a weight for all clusters", self.shared_router)
        for name in ("rank_pattern", "clusters_pattern"):
            if not isinstance(getattr(self, name), dict):
                raise TypeError(f"IdLoraConfig: {name} must be a dictionary, got {getattr(self, name)!r}")
        for pattern, rank in self.rank_pattern.items():
            ok = _is_int(rank) and rank >= 1 and rank % self.rank_boost == 0
            self._require("rank_pattern", f"ranks that are multiples of rank_boost = {self.rank_boost}", ok, pattern)
        for pattern, k in self.clusters_pattern.items():
            self._require("clusters_pattern", "integers >= 1", _is_int(k) and k >= 1, pattern)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if self.target_modules is None:
            raise ValueError('IdLoraConfig: target_modules must be names, a pattern or "all-linear", got None')
        is_pattern = isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear"
        if is_pattern and self.layers_to_transform is not None:
            raise ValueError("IdLoraConfig: layers_to_transform needs target_modules as a list, got a pattern")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("IdLoraConfig: layers_pattern means nothing without layers_to_transform")

    def __getattr__(self, name: str) -> NoReturn:
        # For what was not found: libraries read fields of LoRA's of whatever configuration they are given.
        own = ", which is LoRA's own: docs/peft.md says what there is instead" if name in _LORA_FIELDS else ""
        raise AttributeError(f"IdLoraConfig has no {name}{own}", name=name, obj=self)

    def _require(self, name: str, expected: str, ok: bool, key: str | None = None) -> None:
        if not ok:
            got = getattr(self, name) if key is None else {key: getattr(self, name)[key]}
            raise ValueError(f"IdLoraConfig: {name} must be {expected}, got {got!r}")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it is written to ``adapter_config.json``, beside the rows that were chosen with it."""
        values = super().to_dict() | {"index_stored": True}
        del values["base_mismatch"]
        return values

    def sizes(self, layer: str) -> tuple[int, int]:
        """``(k, r)`` that a layer is to have: its pattern's, or everyone's."""
        k = self.clusters_pattern.get(get_pattern_key(self.clusters_pattern.keys(), layer), self.num_clusters)
        return k, self.rank_pattern.get(get_pattern_key(self.rank_pattern.keys(), layer), self.r)


_LORA_FIELDS = LoraConfig.__dataclass_fields__


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def fit_rank(d: int, num_clusters: int, r: int, rank_boost: int) -> int:
    """``max r' <= r`` with ``k r' <= d``, ``s | r'`` and ``s | d``: the largest rank a layer of ``d`` outputs allows.

    Returns:
        The rank, or 0 if no rank fits.
    """
    if d % rank_boost:
        return 0
    widest = min(r, d // num_clusters)
    return widest - widest % rank_boost
