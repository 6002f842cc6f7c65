"""Whether there is a native module, and if not, why not: ``module`` and ``reason``.

Importing ``_C`` registers CPU and CUDA kernels for the operators of :mod:`idlora_ext.ops` with the dispatcher. Without
it, or with ``IDLORA_NATIVE=0`` in the environment, everything runs on the default kernels.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from types import ModuleType

import torch


def _load() -> tuple[ModuleType | None, str | None]:
    """The module, or None and why not."""
    if os.environ.get("IDLORA_NATIVE") == "0":
        return None, "switched off by IDLORA_NATIVE=0"
    if importlib.util.find_spec("idlora_ext._C") is None:
        return (
            None,
            "not built: there was no C++ compiler or no torch when idlora_ext was installed (reinstall with -v)",
        )
    try:
        _C = importlib.import_module("idlora_ext._C")
    except Exception as error:
        reason = f"not loadable ({' '.join(str(error).split())})"
        warnings.warn(
            f"idlora_ext runs on its default kernels: the native module is {reason}. Reinstall idlora_ext where this "
            f"torch {torch.__version__} is installed (pip install --no-build-isolation --no-deps --force-reinstall), "
            "or leave the module out with IDLORA_NATIVE=0.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None, reason
    return _C, None


module, reason = _load()
