"""The versions of PEFT and transformers that are tested: ``make test-versions`` the oldest, ``make test`` the newest.

PEFT 0.20 and older lack the hooks between a file and the model with which adapters are checked
(``_remap_adapter_state_dict_for_load``); 0.21.0 and 0.21.1 wrap no encoder-decoder of transformers 5.20. Each release
of transformers names the PEFT it wants: 5.24 wants 0.22.
"""

from __future__ import annotations

import importlib.metadata
import warnings

from packaging.version import Version

TESTED = {"peft": ("0.21.2", "0.22"), "transformers": ("5.20.0", "5.24")}  # from, and below; as in pyproject.toml


def warn_if_untested() -> None:
    """One warning that names what is installed outside the tested range."""
    found = {name: importlib.metadata.version(name) for name in TESTED}
    outside = [
        f"{name} {found[name]} (tested: {least} and newer, below {below})"
        for name, (least, below) in TESTED.items()
        if not Version(least) <= Version(found[name]) < Version(below)
    ]
    if outside:
        warnings.warn(
            f"idlora_ext builds on internals of PEFT and transformers and is not tested with {', '.join(outside)}. "
            "Expect errors, or install versions of the tested range.",
            stacklevel=2,
        )


def oldest() -> list[str]:
    """The oldest supported versions, as pip takes them."""
    return [f"{name}=={least}" for name, (least, _) in TESTED.items()]


warn_if_untested()
