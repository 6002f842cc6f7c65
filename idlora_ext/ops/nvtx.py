"""NVTX ranges for Nsight Systems and Nsight Compute: layer | phase | op. Off by default.

A range is called ``layer | phase | op``, for instance
``model.layers.3.self_attn.q_proj | backward | idlora::adapt_backward``, lies in the domain ``idlora`` and encloses just
what the op launches, on the thread that launches it: for a backward pass on CUDA that is a thread of autograd, so the
layer's name travels there with the op's autograd context. No module is hooked.

One switch: ``IDLORA_NVTX=1`` in the environment turns ranges on for the whole process, :func:`nvtx_ranges` for a while.
They need the package ``nvtx`` and cost next to nothing while no profiler is attached.

``torch.compile`` merges layers into one graph, so code it compiles gets no ranges, whether they are on or not, and is
not compiled anew by the switch; ``torch.autograd.profiler.emit_nvtx()`` shows its ops, without their layers. A CUDA
graph has ranges while it is captured, none when it is replayed.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch

DOMAIN = "idlora"

COLOURS = {"forward": "green", "backward": "blue"}

_NOTHING = nullcontext()

domain: Any = None  # of the package nvtx, while ranges are on

_layer: ContextVar[str | None] = ContextVar("idlora_layer", default=None)


@contextmanager
def nvtx_ranges() -> Iterator[None]:
    """Every op of an adapted layer is a range ``layer | phase | op`` of the domain ``idlora``, in all threads.

    A backward pass has ranges if both it and its forward pass run inside.

    Raises:
        ImportError: the package ``nvtx`` is not installed.
    """
    global domain
    before, domain = domain, _nvtx_domain("nvtx_ranges()")
    try:
        yield
    finally:
        domain = before


def no_ranges() -> bool:
    """Whether nothing that is called now has a range."""
    # First what torch.compile knows for certain: so it never looks at the switch, and does not depend on it.
    return torch.compiler.is_compiling() or domain is None


def eager_without_ranges() -> bool:
    """Whether this is plain eager code: neither ranges nor, for a compiler, a way through autograd are asked for."""
    return not torch.compiler.is_compiling() and domain is None  # in this order, as above


def layer(name: str) -> AbstractContextManager[None]:
    """Ops called inside belong to the layer ``name``. Adapted layers do this themselves; an op outside has no range."""
    return _NOTHING if no_ranges() else _named(name)


def current_layer() -> str | None:
    """The layer whose forward pass this is, while ranges are on: what an op's autograd context keeps."""
    return _layer.get()


def op_range(phase: str, op: str, layer: str | None = None) -> AbstractContextManager[None]:
    """The range of one call of ``op`` in ``layer``, by default the current one."""
    if no_ranges():
        return _NOTHING
    layer = layer or _layer.get()
    return _NOTHING if layer is None else _range(domain, layer, phase, op)


@contextmanager
def _named(name: str) -> Iterator[None]:
    token = _layer.set(name)
    try:
        yield
    finally:
        _layer.reset(token)


@contextmanager
def _range(domain: Any, layer: str, phase: str, op: str) -> Iterator[None]:
    domain.push_range(_attributes(domain, layer, phase, op))
    try:
        yield
    finally:
        domain.pop_range()


@functools.cache
def _attributes(domain: Any, layer: str, phase: str, op: str) -> Any:
    return domain.get_event_attributes(f"{layer} | {phase} | {op}", color=COLOURS[phase], category=phase)


def _nvtx_domain(asked_by: str) -> Any:
    try:
        import nvtx
    except ImportError as error:
        raise ImportError(
            f"{asked_by} needs the package nvtx: pip install 'idlora_ext[profile]', or leave the ranges off"
        ) from error
    return nvtx.get_domain(DOMAIN)


def _from_environment() -> Any:
    value = os.environ.get("IDLORA_NVTX", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"IDLORA_NVTX must be 1 (NVTX ranges on), 0 or unset, got {value!r}")
    return _nvtx_domain("IDLORA_NVTX=1") if value == "1" else None


domain = _from_environment()
