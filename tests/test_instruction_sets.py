"""The tests of CPU kernels once more, under each instruction set below the one that this processor has."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from idlora_ext import native

CAPABILITIES = ("baseline", "avx2", "avx512")  # asking for more than the processor has changes nothing
FOLDER = Path(__file__).parent
KERNELS = FOLDER / "ops/test_cpu_kernels.py"
PASSES = FOLDER / "rows/test_clustering_native.py"
SELECTED = "test_kernel or test_passes or test_every_number_of_16_bits_is_read_as_it_is"
RUN = f"""
import pytest, sys
from idlora_ext import native
assert native.module.cpu_capability() == sys.argv[1]
sys.exit(pytest.main(["-q", "--noconftest", "-p", "no:cacheprovider", "-k", {SELECTED!r}, *sys.argv[2:]]))
"""


@pytest.mark.subprocess
@pytest.mark.skipif(native.module is None, reason=f"no native kernels: {native.reason}")
@pytest.mark.parametrize("capability", CAPABILITIES[:-1])
def test_every_instruction_set(capability):
    best = native.module.cpu_capability()
    if CAPABILITIES.index(capability) >= CAPABILITIES.index(best):
        pytest.skip(f"this processor, or IDLORA_CPU_CAPABILITY, has {best}: the other tests have run on it")
    run = subprocess.run(
        [sys.executable, "-c", RUN, capability, KERNELS, PASSES],
        env={**os.environ, "IDLORA_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    passed = int(re.search(r"(\d+) passed", run.stdout)[1])
    assert passed > 120, "one of the two files has none"
