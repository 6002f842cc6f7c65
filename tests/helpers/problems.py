"""Tensors for the operators in every form, and matrices to choose rows from."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from idlora_ext import ops


def every_pair(**values: dict[str, Any]) -> pytest.MarkDecorator:
    """Parameters, of each a dictionary from id to value: not every combination, but every two values together somewhere.

    A check that fails for one value, or for two that meet, fails in one of these cases too.
    """
    names, cases = list(values), list(itertools.product(*values.values()))

    def pairs(case: tuple[str, ...]) -> set[tuple[tuple[int, str], ...]]:
        return set(itertools.combinations(enumerate(case), 2))

    left, chosen = set().union(*map(pairs, cases)), []
    while left:
        chosen.append(max(cases, key=lambda case: len(pairs(case) & left)))
        left -= pairs(chosen[-1])
    arguments = [tuple(values[name][key] for name, key in zip(names, case, strict=True)) for case in chosen]
    return pytest.mark.parametrize(names, arguments, ids=["-".join(case) for case in chosen])


def each(**values: dict[str, Any]) -> pytest.MarkDecorator:
    """Parameters as above, and every value at least once: as many cases as the longest has values."""
    names, count = list(values), max(map(len, values.values()))
    cases = [[list(some)[i % len(some)] for some in values.values()] for i in range(count)]
    arguments = [tuple(values[name][key] for name, key in zip(names, case, strict=True)) for case in cases]
    return pytest.mark.parametrize(names, arguments, ids=["-".join(case) for case in cases])


def named(values: Iterable[Any]) -> dict[str, Any]:
    return {str(value): value for value in values}


# ---- operators -------------------------------------------------------------------------------------------------------


def adapter_tensors(
    d: int,
    k: int,
    r: int,
    s: int,
    *,
    shared: bool = False,
    static: bool = False,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Random index, router and B of one layer, scaled so that the update is of the size of the activation."""
    index = torch.randperm(d)[: k * r].view(k, r).to(torch.int32)
    rows = 1 if shared else k
    router = torch.randn(rows, r, dtype=torch.float64) / (k * r) ** 0.5
    if static:
        router = 1 + 0.5 * torch.randn(rows, dtype=torch.float64)
    B = torch.randn(d // s, r // s, dtype=torch.float64) / (r // s) ** 0.5
    return index.to(device), router.to(device, dtype), B.to(device, dtype)


# What there is to choose of an operator's router and rows: what `adapter_tensors` takes, and `options`.
FORMS: dict[str, dict[str, bool]] = {
    "per-cluster": {},
    "shared": {"shared": True},
    "static-per-cluster": {"static": True},
    "static": {"static": True, "shared": True},
    "bounded": {"shared": True, "bounded": True},
    "per-cluster, scaled": {"scaled": True},
    "static, scaled": {"static": True, "shared": True, "scaled": True},
    "bounded, scaled": {"shared": True, "bounded": True, "scaled": True},
    "static-per-cluster, centred": {"static": True, "centred": True},
    "static, centred": {"static": True, "shared": True, "centred": True},
    "static, scaled, centred": {"static": True, "shared": True, "scaled": True, "centred": True},
    "bounded, centred": {"shared": True, "bounded": True, "centred": True},
    "bounded, scaled, centred": {"shared": True, "bounded": True, "scaled": True, "centred": True},
}
# One form with each router, scaled rows and a center in some: where a router's shape and these are not at odds.
EVERY_ROUTER = {
    name: FORMS[name]
    for name in (
        "per-cluster, scaled",
        "shared",
        "static-per-cluster",
        "static, scaled",
        "bounded, scaled",
        "static-per-cluster, centred",
        "static, centred",
        "bounded, scaled, centred",
    )
}
BIASES = {"no-bias": None, "bias-added": False, "bias-inside": True}

every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
every_router = pytest.mark.parametrize("form", EVERY_ROUTER.values(), ids=EVERY_ROUTER)


def tensors_of(form: dict[str, bool], *shape: int, **fields: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Index, router and B of a form."""
    return adapter_tensors(*shape, **{name: form.get(name, False) for name in ("shared", "static")}, **fields)


def options(form: dict[str, bool], index: Tensor) -> dict[str, Any]:
    """What an operator takes beside the tensors: ``row_scale``, ``bounded`` and ``center``."""
    generator = torch.Generator().manual_seed(3)
    c = 0.5 + torch.rand(index.shape, generator=generator)
    center = centering(index.shape[1], generator)
    return {
        "row_scale": c.to(index.device) if form.get("scaled") else None,
        "bounded": form.get("bounded", False),
        "center": center.to(index.device) if form.get("centred") else None,
    }


def centering(r: int, generator: torch.Generator) -> Tensor:
    """``ubar`` and ``w``, ``[2, r]``, with ``<w, ubar>`` about 0.9."""
    ubar, noise = torch.randn(2, r, generator=generator)
    return torch.stack([ubar, (0.9 * ubar + 0.1 * noise) / ubar.square().sum()])


def problem(
    shape,
    leading=(5,),
    form=FORMS["per-cluster"],
    bias=None,
    dtype=torch.float64,
    device="cpu",
    requires_grad=True,
):
    d, k, r, s = shape
    torch.manual_seed(0)
    index, router, B = tensors_of(form, d, k, r, s, dtype=dtype, device=device)
    y0 = torch.randn(*leading, d, dtype=torch.float64).to(device, dtype)
    b = None if bias is None else torch.randn(d, dtype=torch.float64).to(device, dtype)
    for t in (y0, router, B, b):
        if t is not None:
            t.requires_grad_(requires_grad)
    return y0, index, router, B, b


def fused_and_composed(index, bias, form):
    """``adapt`` in one operator, and made of the three."""
    given = options(form, index)

    def fused(y0, router, B, b):
        return ops.adapt(y0, index, router, B, b, 0.7, bias_in_y0=bool(bias), **given)

    def composed(y0, router, B, b):
        x = ops.cluster_gather(y0, index, b if bias else None, given["row_scale"])
        z = ops.rb_scale(x, router, given["bounded"], given["center"])
        return ops.shared_gemm(y0, z, B, None if bias else b, 0.7)

    return fused, composed


# ---- row choice ------------------------------------------------------------------------------------------------------


def matrix(kind: str, d: int = 640, d_in: int = 256, seed: int = 0) -> Tensor:
    """Rows of the kinds that weights have: alike, of very different norms, with outliers, few directions."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(d, d_in, generator=g)
    if kind == "heavy tails":
        W *= torch.randn(d, 1, generator=g).mul(0.7).exp()
    elif kind == "outlier rows":
        W[torch.randperm(d, generator=g)[:6]] *= 20
    elif kind == "low rank":
        W = W[:, :8] @ torch.randn(8, d_in, generator=g) * torch.randn(d, 1, generator=g).exp() + W
    return W


MATRICES = ("gaussian", "heavy tails", "outlier rows", "low rank")


DEGENERATE = {
    "zeros": torch.zeros(40, 6),
    "one constant": torch.full((40, 6), 0.1),
    "constant rows": torch.arange(40.0)[:, None].expand(40, 6),
    "two distinct rows": torch.tensor([[1.0, 2, 3], [-1, 0.1, 0.3]]).repeat(20, 1),
    "three distinct rows, very uneven": torch.eye(3)[[0] * 38 + [1, 2]],
    "an outlier beyond all bounds": torch.cat([torch.full((1, 6), 1e30), torch.eye(6).repeat(7, 1)[:39]]),
    "tiny": torch.full((40, 6), 1e-40),
    "huge": torch.linspace(-1, 1, 240, dtype=torch.float64).view(40, 6) * 1e150,
    "one feature": torch.arange(40.0)[:, None],
    "as many rows as places": matrix("gaussian", d=20, d_in=6),
}
