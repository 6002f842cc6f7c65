"""The face of the package: exactly these names, each with a docstring that opens with what it computes or does."""

from __future__ import annotations

import inspect

import pytest

import idlora_ext

NAMES = [
    "IdLoraConfig", "IdLoraModel", "Summary", "__version__", "adapter_names", "apply", "calibrate", "load", "native", "ops",
    "profiling", "remove", "save", "summary", "tested_versions", "to_lora",
]  # fmt: skip
OPERATORS = ["adapt", "adapt_", "adapt_backward", "cluster_gather", "rb_scale", "shared_gemm"]
MODULES = ["native", "ops", "profiling", "tested_versions"]
COMPUTE_NOTHING = ["Summary", "load", "remove", "save", "summary"]


def test_these_names_and_no_others():
    assert idlora_ext.__all__ == NAMES
    assert idlora_ext.ops.__all__ == OPERATORS
    assert all(hasattr(idlora_ext, name) for name in NAMES)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "__version__"] + [f"ops.{n}" for n in OPERATORS])
def test_docstrings_open_with_the_equation(name):
    value = idlora_ext
    for part in name.split("."):
        value = getattr(value, part)
    first = inspect.getdoc(value).split("\n\n")[0]
    assert name in MODULES + COMPUTE_NOTHING or "=" in first or ":func:`adapt`" in first, first
