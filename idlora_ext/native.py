"""Loads the native module ``_C``: CPU and CUDA kernels for the operators of :mod:`idlora_ext.ops`.

Importing ``_C`` registers its kernels with the dispatcher, over the default ones. What they do not serve (float64,
wrong arguments, a GPU the module was not built for) they hand back through the private ops ``idlora::default_*``.
Without the module, or with ``IDLORA_NATIVE=0`` in the environment, everything runs on the default kernels.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import default_kernels

_library = torch.library.Library("idlora", "FRAGMENT")


def _load() -> tuple[ModuleType | None, str | None]:
    """The module, or None and why not."""
    if os.environ.get("IDLORA_NATIVE") == "0":
        return None, "switched off by IDLORA_NATIVE=0"
    if importlib.util.find_spec("idlora_ext._C") is None:
        note = Path(__file__).with_name("not_built.txt")  # written by setup.py
        why = note.read_text() if note.exists() else "this copy of idlora_ext has not been through setup.py"
        return None, _warned(f"not built: {why}")
    try:
        _C = importlib.import_module("idlora_ext._C")
    except Exception as error:
        return None, _warned(f"not loadable ({' '.join(str(error).split())})")
    for schema in default_kernels.SCHEMAS:
        op, _, signature = schema.partition("(")
        _library.define(f"default_{op}({signature}")
        returns = signature.partition("->")[2].count("Tensor")
        kernel = _keeping_errors(_C, default_kernels.default_kernels[op], returns)
        _library.impl(f"default_{op}", kernel, "CompositeExplicitAutograd")
    return _C, None


def _warned(reason: str) -> str:
    if sys.platform == "linux":  # elsewhere there is no module, and no way out
        warnings.warn(
            f"idlora_ext runs on its default kernels: the native module is {reason}. Reinstall idlora_ext where this "
            f'torch {torch.__version__} is installed (pip install "setuptools>=77" pybind11 ninja, then pip install '
            "--no-build-isolation --no-deps --force-reinstall --no-cache-dir path/to/idlora_ext), or leave the module "
            "out with IDLORA_NATIVE=0.",
            RuntimeWarning,
            stacklevel=4,
        )
    return reason


def _keeping_errors(_C: ModuleType, kernel: Callable[..., Any], returns: int) -> Callable[..., Any]:
    """``kernel``, called from C++ through an interface that carries no exceptions: they go round it."""

    def run(*args: Any) -> Any:
        try:
            return kernel(*args)
        except BaseException as error:
            _C.keep(error)
            if not returns:
                return None
            nothing = torch.empty(0)
            return nothing if returns == 1 else (nothing,) * returns

    return run


module, reason = _load()
