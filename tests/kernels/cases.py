"""What the kernels are run on: every family and variant, dtype, alignment, boost and number of clusters.

Imports torch alone: each simulated device is a process of its own and should start quickly.
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

SCALING = 0.7

# d, k, r, s
REFERENCE = [(1024, 4, 128, 2)]
ALIGNED = [
    (64, 4, 16, 2),
    (256, 4, 64, 4),
    (136, 1, 32, 1),
    (1040, 16, 32, 2),
    (768, 2, 256, 2),
    (512, 3, 96, 1),
    (2048, 8, 64, 4),
]
ODD = [(1032, 4, 24, 2), (7, 1, 7, 1), (30, 5, 6, 3), (33, 16, 2, 1), (260, 4, 36, 2), (11, 11, 1, 1), (516, 2, 200, 4)]
LARGE = [((4096, 4, 128, 2), 5), ((4096, 4, 128, 2), 37), ((14336, 4, 128, 2), 1), ((14336, 4, 128, 2), 16)]
TOKENS = (0, 1, 5, 16, 37, 64, 65)
MANY = 8 * 132 * 32 + 5  # more tiles of tokens than the first launch of adapt_backward has blocks, on all devices

TENSOR_DTYPES = ("bfloat16", "float16")
TENSOR_VARIANTS = {"shared_gemm": ("prefill",), "adapt": ("prefill", "decode"), "adapt_backward": ("prefill",)}
ROUTED = ("rb_scale", "adapt", "adapt_backward")
OPS = ("cluster_gather", "rb_scale", "shared_gemm", "adapt", "adapt_backward")


@dataclass(frozen=True)
class Case:
    """One call of one kernel."""

    op: str
    variant: str
    dtype: str
    shape: tuple[int, int, int, int]
    N: int
    parameters: str  # dtype of router, B and bias
    rows: str  # "contiguous", "strided", or "misaligned": rows of y0 or dy start anywhere
    bias: str  # "none", "added" or "inside"
    shared: bool  # one router for all clusters
    static: bool = False
    bounded: bool = False
    scaled: bool = False  # rows by c_ij
    centred: bool = False  # a center beside the router
    keep_x: bool = False
    outlier: bool = False  # activations of 300: z, quadratic in them, leaves the range of float16

    def __str__(self) -> str:
        words = [self.op, self.variant, self.dtype, "x".join(map(str, self.shape)), f"N{self.N}", self.rows]
        words += [f"{self.parameters}-parameters"] if self.parameters != self.dtype else []
        words += [f"bias-{self.bias}"] if self.bias != "none" else []
        words += ["shared"] if self.shared else []
        words += [form for form in ("static", "bounded", "scaled", "centred") if getattr(self, form)]
        words += ["keep-x"] if self.keep_x else []
        words += ["outlier"] if self.outlier else []
        return "-".join(words)


def inputs(case: Case, tokens: int | None = None, draw: int = 0) -> dict[str, Any]:
    """The op's arguments by name. Scaled so that the update is of the size of the activation.

    ``tokens``: so many instead of the case's, with the same adapter. ``draw``: other numbers of the same kind.
    """
    d, k, r, s = case.shape
    N = case.N if tokens is None else tokens
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()) + draw)

    def normal(*shape: int, dtype: str, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(getattr(torch, dtype))

    index = torch.randperm(d, generator=generator)[: k * r].view(k, r).to(torch.int32)
    router = normal(1 if case.shared else k, r, dtype=case.parameters, scale=(k * r) ** -0.5)
    B = normal(d // s, r // s, dtype=case.parameters, scale=(r // s) ** -0.5)
    bias = None if case.bias == "none" else normal(d, dtype=case.parameters)
    y0 = normal(N, d, dtype=case.dtype)
    x = normal(N, k, r, dtype=case.dtype)
    if case.static:
        router = 1 + 0.5 * normal(len(router), dtype=case.parameters)
    if case.bounded or router.shape == (1,):
        x = x.sum(1) if case.op == "adapt_backward" else x
    if case.outlier:
        y0, x = y0 + 300, x + 300
        router, B = 100 * (1 + router.abs()) if case.static else router.abs(), B * 1e-5
    y0, dy = (
        _rows(y0, case.rows),
        _rows(normal(N, d, dtype=case.dtype, scale=1e-3 if case.outlier else 1.0), case.rows),
    )
    row_scale = 0.5 + torch.rand(k, r, generator=generator) if case.scaled else None
    center = _center(r, generator) if case.centred else None
    return {
        "cluster_gather": {"y0": y0, "index": index, "bias": bias, "row_scale": row_scale},
        "rb_scale": {"x": x, "router": router, "bounded": case.bounded, "center": center},
        "shared_gemm": {
            "y0": y0,
            "z": normal(N, r, dtype="float32"),
            "B": B,
            "bias": bias,
            "scaling": SCALING,
        },
        "adapt": {
            "y0": y0,
            "index": index,
            "router": router,
            "B": B,
            "bias": bias,
            "scaling": SCALING,
            "bias_in_y0": case.bias == "inside",
            "row_scale": row_scale,
            "bounded": case.bounded,
            "center": center,
        },
        "adapt_backward": {
            "dy": dy,
            "x": x,
            "index": index,
            "router": router,
            "B": B,
            "scaling": SCALING,
            "row_scale": row_scale,
            "bounded": case.bounded,
            "center": center,
        },
    }[case.op]


def _center(r: int, generator: torch.Generator) -> Tensor:
    """``ubar`` and ``w``, with ``<w, ubar>`` about 0.9."""
    ubar, noise = torch.randn(2, r, generator=generator)
    return torch.stack([ubar, (0.9 * ubar + 0.1 * noise) / ubar.square().sum()])


def _rows(t: Tensor, rows: str) -> Tensor:
    """The same values in rows that are apart, with NaN between them."""
    gap, start = {"contiguous": (0, 0), "strided": (24, 8), "misaligned": (3, 1)}[rows]
    wide = torch.full((len(t), t.shape[1] + gap + start), float("nan"), dtype=t.dtype)
    view = wide[:, start : start + t.shape[1]]
    return view.copy_(t)


def _cases() -> Iterator[Case]:
    """All of variant x dtype x shape x N; what else there is to choose is drawn for each, always alike."""
    choose = random.Random(0).choice

    def case(op: str, variant: str, dtype: str, shape: tuple[int, int, int, int], N: int, rows: str) -> Case:
        biases = {
            "cluster_gather": ("none", "inside"),
            "shared_gemm": ("none", "added"),
            "adapt": ("none", "added", "inside"),
        }
        return Case(
            op,
            variant,
            dtype,
            shape,
            N,
            parameters=choose((dtype, "float32")),
            rows="contiguous" if op == "rb_scale" else rows,
            bias=choose(biases.get(op, ("none",))),
            shared=op in ROUTED and choose((True, False)),
            keep_x=op == "adapt" and choose((True, False)),
        )

    for op, dtype in itertools.product(OPS, ("float32", *TENSOR_DTYPES)):
        for shape, N in itertools.product(REFERENCE + ALIGNED + ODD, TOKENS):
            if shape in REFERENCE or choose((True, False, False)):
                yield case(op, "automatic", dtype, shape, N, choose(("contiguous", "strided", "misaligned")))
    for dtype, (op, variants) in itertools.product(TENSOR_DTYPES, TENSOR_VARIANTS.items()):
        for variant, shape, N in itertools.product((*variants, "plain"), REFERENCE + ALIGNED, TOKENS):
            served = 0 < N <= 64 if variant == "decode" else N > 0
            if served and (shape in REFERENCE or choose((True, False))):
                yield case(op, variant, dtype, shape, N, choose(("contiguous", "strided")))
        for shape, N in LARGE:
            yield case(op, "automatic", dtype, shape, N, "contiguous")
    yield case("adapt_backward", "prefill", "bfloat16", (64, 4, 16, 2), MANY, "contiguous")
    for op, variants in TENSOR_VARIANTS.items():
        for variant in (*variants, "plain"):
            if op != "shared_gemm":
                yield Case(
                    op, variant, "float16", (256, 4, 64, 4), 5, "float32", "contiguous", "none", True, outlier=True
                )


def _static(cases: list[Case]) -> Iterator[Case]:
    """A part of the cases, every variant among them, once more with a static router."""
    choose = random.Random(1).choice
    for case in cases:
        if case.op not in ROUTED:
            continue
        if case.outlier or case.N == MANY:
            yield replace(case, static=True, shared=case.outlier)
        elif case.shape in REFERENCE or choose((True, False, False)):
            yield replace(case, static=True, shared=choose((True, False)))


def _forms(cases: list[Case]) -> Iterator[Case]:
    """A part of the cases with a bounded router, scaled rows or both, every variant among them."""
    choose = random.Random(2).choice
    for case in cases:
        if case.op == "shared_gemm" or case.outlier:
            continue
        if case.N == MANY:
            yield replace(case, bounded=True, shared=True, scaled=True)
        elif choose((True, False)) if case.shape in REFERENCE else choose((True, False, False, False, False, False)):
            bounded = case.op in ROUTED and (case.op == "rb_scale" or choose((True, True, False)))
            scaled = case.op != "rb_scale" and (not bounded or choose((True, False)))
            form = choose(("linear", "static")) if case.op in ROUTED else ""
            static = form == "static" and not bounded
            yield replace(case, bounded=bounded, scaled=scaled, static=static, shared=bounded or case.shared)


def _centred(cases: list[Case]) -> Iterator[Case]:
    """A part of the cases with a static or a bounded router once more with a center, every variant among them.

    In no order: of those that are not thinned out every router is to be among the first.
    """
    choose = random.Random(3)
    routed = [case for case in cases if case.static or case.bounded]
    for case in choose.sample(routed, len(routed)):
        if case.shape in REFERENCE or case.outlier or case.N == MANY or choose.choice((True, False, False)):
            yield replace(case, centred=True)


def _thinned(cases: list[Case]) -> Iterator[Case]:
    """The cases in which, for a variant of an op, two properties meet for the first time. Sizes have to meet the dtype and
    the kind of router alone: the rest is for all sizes the same code. And every kernel that is compiled has a case."""
    met = set()
    for case in cases:
        properties = {name: value for name, value in vars(case).items() if name not in ("op", "variant")}
        pairs = set(itertools.combinations(properties.items(), 2))
        pairs -= {
            (a, b)
            for a, b in pairs
            if {a[0], b[0]} & {"shape", "N"} and not {a[0], b[0]} & {"dtype", "static", "bounded", "centred"}
        }
        _, _, r, s = case.shape
        compiled = case.dtype, case.parameters, r // s > 64  # what a kernel is compiled for
        new = {(case.op, case.variant, *pair) for pair in (*pairs, compiled)} - met
        met |= new
        if new:
            yield case


_every = list(dict.fromkeys(_cases()))
_uncentred = [*_every, *dict.fromkeys(_static(_every)), *dict.fromkeys(_forms(_every))]
CASES = list(_thinned([*_uncentred, *dict.fromkeys(_centred(_uncentred))]))
