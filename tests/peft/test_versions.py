"""The range of PEFT and transformers that is tested, and what is said outside of it."""

from __future__ import annotations

import importlib.metadata
import re
import warnings
from pathlib import Path

import pytest

from idlora_ext.tested_versions import TESTED, oldest, warn_if_untested

ROOT = Path(__file__).parents[2]


def test_the_range_is_that_of_the_requirements():
    requirements = (ROOT / "pyproject.toml").read_text()
    for name, (least, below) in TESTED.items():
        assert f'"{name}>={least},<{below}"' in requirements
    assert oldest() == [f"{name}=={least}" for name, (least, _) in TESTED.items()]


def test_the_installed_versions_are_in_the_range():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_untested()


@pytest.mark.parametrize("version", ["0.20.0", "0.22.0"])
def test_another_version_is_one_clear_warning(version, monkeypatch):
    installed = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "peft" else installed(name))
    with pytest.warns(
        UserWarning, match=rf"not tested with peft {version} \(tested: .* and newer, below 0.22\)"
    ) as said:
        warn_if_untested()
    assert len(said) == 1


def test_internals_of_peft_are_imported_in_one_file():
    private = re.compile(r"^\s*(?:from|import) (peft\.(?:tuners|mapping|mixed_model|utils\.\w+)\b.*)", re.MULTILINE)
    package = ROOT / "idlora_ext"
    found = {file.relative_to(package).as_posix(): private.findall(file.read_text()) for file in package.rglob("*.py")}
    assert {name for name, imports in found.items() if imports} == {"base/peft_internals.py", "patches.py"}
    assert found["patches.py"] == ["peft.mixed_model", "peft.utils.hotswap"]  # which it changes
