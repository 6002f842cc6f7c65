"""Commands of this package, and other processes that import what this one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from idlora_ext.cli import main

ROOT = Path(__file__).parents[2]
ADAPTER = ["--r", "8", "--num-clusters", "2"]
PNG = b"\x89PNG\r\n\x1a\n"


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that must fail, and return its message."""
    capsys.readouterr()
    try:
        code = main(argv)
    except SystemExit as end:  # argparse's own
        code = end.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.startswith("idlora: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def environment(**variables: str | None) -> dict[str, str]:
    """Of a process that finds the modules this one finds; variables set to None are unset."""
    path = os.pathsep.join(filter(None, sys.path))
    given = os.environ | {"PYTHONPATH": path} | variables
    return {name: value for name, value in given.items() if value is not None}


def python(*arguments: Any, cwd: Path | None = None, **variables: str | None) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment(**variables), cwd=cwd, capture_output=True, text=True)


PLAIN = """
import sys
sys.modules["idlora_ext"] = None  # any import of it fails
import torch
from peft import PeftModel
from safetensors.torch import save_file
import transformers

results = {}
for job in sys.argv[2:]:
    kind, base, adapter = job.split("=")
    model = getattr(transformers, kind).from_pretrained(base, dtype=torch.float64)
    model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        results[adapter] = model(input_ids=torch.load(base + "/ids.pt")).logits
assert sys.modules["idlora_ext"] is None
save_file(results, sys.argv[1])
"""


def read_in_plain_peft(file: str, jobs: list[str]) -> dict[str, Tensor]:
    done = subprocess.run([sys.executable, "-c", PLAIN, file, *jobs], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "missing" not in done.stderr.lower(), done.stderr
    return load_file(file)
