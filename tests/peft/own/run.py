"""Run PEFT's own behaviour tests against ID-LoRA: ``python tests/peft/own/run.py [pytest arguments]``.

Fetches the sources of the installed PEFT (its tests are not in the wheel), puts small random models where they ask the
hub, and runs them with ``plugin.py``, which adds our rows to their lists. Their files stay as they are.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[2] / "build" / "peft_own"
SITE = BUILD / "site"
# Left out, since nothing in them could be ours: files of one other method each, of convolutions (vision_models), of mixed
# models (refused), of adapters on the hub (auto, hub_features), and of GPUs. test_torch_compile has its counterpart in
# tests/peft/test_training_stack.py.
FILES = [
    "custom_models", "decoder_models", "encoder_decoder_models", "feature_extraction_models", "seq_classifier",
    "token_classification_qa", "config", "low_level_api", "mapping", "other", "tuners_utils",
]  # fmt: skip


def fetch() -> Path:
    """PEFT's tests, as a package: they import one another relatively."""
    package = BUILD / f"peft_{version('peft').replace('.', '_')}"
    if not (package / "__init__.py").exists():
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--no-deps", "--target", SITE, "parameterized"], check=True)
        source = ["--no-deps", "--no-binary", "peft", "--no-build-isolation", f"peft=={version('peft')}"]
        subprocess.run([*pip, "download", "--dest", BUILD, *source], check=True)
        package.mkdir(exist_ok=True)
        with tarfile.open(BUILD / f"peft-{version('peft')}.tar.gz") as archive:
            for member in archive.getmembers():
                parts = Path(member.name).parts
                if len(parts) == 3 and parts[1] == "tests" and member.isfile():
                    (package / parts[2]).write_bytes(archive.extractfile(member).read())
        (package / "__init__.py").touch()
    return package


def main(arguments: list[str]) -> int:
    BUILD.mkdir(parents=True, exist_ok=True)
    package, hub = fetch(), BUILD / "hub"
    environment = os.environ | {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), str(SITE), os.environ.get("PYTHONPATH")]))
    subprocess.run([sys.executable, HERE / "models.py", hub], check=True, env=environment)
    chosen = [a for a in arguments if a.startswith("test_")]
    files = [str(package / name) for name in chosen or (f"test_{name}.py" for name in FILES)]
    rest = [a for a in arguments if a not in chosen]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        os.devnull,
        "--rootdir",
        BUILD,
        "-p",
        "plugin",
        "-p",
        "no:cacheprovider",
    ]
    return subprocess.run([*command, "-q", "--disable-warnings", *files, *rest], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
