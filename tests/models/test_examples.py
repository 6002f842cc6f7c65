"""Every example runs, as its reader would run it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from tests.helpers.commands import ROOT

FOLDER = ROOT / "examples"
NOT_EXAMPLES = {"assets", "demo"}  # what they share, and `make demo`
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in NOT_EXAMPLES)
LAUNCHER = {"two_processes": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]}
SECONDS = 300  # about twenty when nothing else runs


@pytest.mark.real_model
@pytest.mark.subprocess
@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, tmp_path):
    path = FOLDER / f"{name}.py"
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    # An optional package is one the example tells its reader to install.
    for package in re.findall(r"^ *pip install (.+)$", text, re.MULTILINE):
        for needed in package.split():
            if importlib.util.find_spec(needed) is None:
                pytest.skip(f"needs {needed}, which is not installed")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(FOLDER.parent), os.environ.get("PYTHONPATH")]))
    }
    command = [sys.executable, *LAUNCHER.get(name, []), str(path)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
