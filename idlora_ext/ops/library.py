"""Where the operators meet the dispatcher: schemas, fakes, default kernels, gradients, all under ``idlora::``.

Default kernels are registered as ``CompositeExplicitAutograd``, the default of every device. A native module only adds
CPU and CUDA kernels for the same schemas, and hands back what they do not serve (float64, wrong arguments, a GPU it was
not built for) through the private operators ``idlora::default_*``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import native
from . import autograd, fakes
from .default_kernels import default_kernels

SCHEMAS = (
    "cluster_gather(Tensor y0, Tensor index, Tensor? bias=None, Tensor? row_scale=None) -> Tensor",
    "cluster_gather_backward(Tensor dx, Tensor index, SymInt d, Tensor? row_scale=None) -> Tensor",
    "rb_scale(Tensor x, Tensor router, bool bounded=False, Tensor? center=None) -> Tensor",
    "rb_scale_backward(Tensor dz, Tensor x, Tensor router, bool bounded=False, Tensor? center=None) "
    "-> (Tensor, Tensor)",
    "shared_gemm(Tensor y0, Tensor z, Tensor B, Tensor? bias=None, float scaling=1.0) -> Tensor",
    "shared_gemm_backward(Tensor dy, Tensor z, Tensor B, float scaling) -> (Tensor, Tensor)",
    "adapt(Tensor y0, Tensor index, Tensor router, Tensor B, Tensor? bias=None, float scaling=1.0, "
    "bool bias_in_y0=False, Tensor? row_scale=None, bool bounded=False, Tensor? center=None, bool save_x=False) "
    "-> (Tensor, Tensor)",
    "adapt_(Tensor(a!) y0, Tensor index, Tensor router, Tensor B, Tensor? bias=None, float scaling=1.0, "
    "bool bias_in_y0=False, Tensor? row_scale=None, bool bounded=False, Tensor? center=None) -> ()",
    "adapt_backward(Tensor dy, Tensor x, Tensor index, Tensor router, Tensor B, float scaling, "
    "Tensor? row_scale=None, bool bounded=False, Tensor? center=None) -> (Tensor, Tensor, Tensor)",
)


def _keeping_errors(kernel: Callable[..., Any], returns: int) -> Callable[..., Any]:
    """``kernel``, called from C++ through an interface that carries no exceptions: they go round it."""

    def run(*args: Any) -> Any:
        try:
            return kernel(*args)
        except BaseException as error:
            native.module.keep(error)  # type: ignore[union-attr]
            if not returns:
                return None
            nothing = torch.empty(0)
            return nothing if returns == 1 else (nothing,) * returns

    return run


def _register(library: torch.library.Library) -> None:
    for schema in SCHEMAS:
        op, _, signature = schema.partition("(")
        kernel = default_kernels[op]
        library.define(schema)
        torch.library.register_fake(f"idlora::{op}", getattr(fakes, op), lib=library)
        library.impl(op, kernel, "CompositeExplicitAutograd")
        if native.module is not None:
            returns = signature.partition("->")[2].count("Tensor")
            library.define(f"default_{op}({signature}")
            library.impl(f"default_{op}", _keeping_errors(kernel, returns), "CompositeExplicitAutograd")
    autograd.register(library)


library = torch.library.Library("idlora", "DEF")  # what it registers lives as long as it does
_register(library)
