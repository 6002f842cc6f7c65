"""Fixtures that several test files share, and how tests are shared out over processes.

Imports are where they are needed: the process that only hands out tests is not to load torch and transformers first.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.helpers")

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores, and a thread in each; their children inherit it
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)

NVTX = Path(__file__).parent / "helpers" / "nvtx_injection.c"
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")

# Seconds of work: these start first, so that all processes end together.
LONGEST = (
    "test_kernels", "test_examples", "test_distributed", "test_training_stack", "test_compare", "test_cpu_kernels",
    "test_ops", "test_tuner", "test_cli", "test_centering", "test_variants", "test_quantised", "test_behaviours",
)  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``device``: where the operators run. ``row``: a row of the table of models, of those that PEFT's behaviour is for."""
    if "device" in metafunc.fixturenames:
        import torch

        metafunc.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    if "row" in metafunc.fixturenames:
        from tests.helpers.models import MODELS, OF_PEFT

        metafunc.parametrize("row", [MODELS[name] for name in OF_PEFT], ids=OF_PEFT)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a model and a tokenizer of one token a byte."""
    from tests.helpers.models import tiny_llama
    from tests.helpers.text import byte_tokenizer

    directory = tmp_path_factory.mktemp("model")
    tiny_llama(vocab_size=260, bos_token_id=1, eos_token_id=0, pad_token_id=0).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def pairs_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prompts of several lengths, all with the same answer: soon learnt."""
    from tests.helpers.text import write_jsonl

    records = [{"prompt": f"{10**i} times 0 is", "completion": " nothing"} for i in range(20)]
    return str(write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", *records))


@pytest.fixture(scope="session")
def text_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"{i} and {i} make {2 * i}.\n" for i in range(150)))
    return str(path)


@pytest.fixture(scope="session")
def run_path(model_path: str, pairs_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a short fine-tuning."""
    from idlora_ext.cli import main
    from tests.helpers.commands import ADAPTER

    output = tmp_path_factory.mktemp("runs") / "run"
    options = ["--steps", "12", "--every", "4", "--lr", "2e-2", "--dropout", "0.1"]
    assert main(["finetune", model_path, pairs_path, "--output", str(output), *options, *ADAPTER]) == 0
    return output


@pytest.fixture(scope="session")
def record(tmp_path_factory):
    """Runs Python as under a profiler; returns the ranges' names in the order they opened, by scenario."""
    from idlora_ext.ops.nvtx import DOMAIN
    from tests.helpers.commands import environment

    pytest.importorskip("nvtx")
    if COMPILER is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler, to build a library that NVTX loads in the place of a profiler")
    folder = tmp_path_factory.mktemp("nvtx")
    library, file = folder / "nvtx_injection.so", folder / "record"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", library, NVTX], check=True)

    def run(*arguments: str, **variables: str) -> dict[str, list[str]]:
        file.write_text("")
        nvtx = {"NVTX_INJECTION64_PATH": str(library), "NVTX_RECORD": str(file)}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, env=environment(**nvtx, **variables), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        scenario, names, depth = "", {"": []}, Counter()
        for line in file.read_text().splitlines():
            kind, thread, domain, *message = line.split(" ", 3)
            if domain == "scenario":
                scenario = message[0] if message else ""
                names.setdefault(scenario, [])
            elif domain == DOMAIN:
                depth[thread] += 1 if kind == "push" else -1
                assert depth[thread] in (0, 1), f"{scenario}: ranges are nested, or popped twice: {line}"
                names[scenario] += message
        assert not +depth, "a range was never closed"
        return names

    return run
