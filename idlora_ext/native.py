"""Whether there is a native module, and if not, why not: ``module`` and ``reason``.

Importing ``_C`` registers CPU and CUDA kernels for the operators of :mod:`idlora_ext.ops` with the dispatcher. Without
it, or with ``IDLORA_NATIVE=0`` in the environment, everything runs on the default kernels.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType

import torch


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


module, reason = _load()
