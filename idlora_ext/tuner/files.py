"""``adapter_config.json`` and ``adapter_model.safetensors``: read, write. Nothing here knows a model."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..layer.config import IdLoraConfig

CARD_NAME = "README.md"


def read_tensors(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a safetensors file; anything else is refused, since unpickling runs what the file says."""
    if not str(file).endswith(".safetensors"):
        raise ValueError(f"{file}: adapters are read from .safetensors files only")
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: not a readable safetensors file: {error}") from error


def read_config(directory: str | os.PathLike[str]) -> IdLoraConfig:
    """Read ``adapter_config.json``.

    Raises:
        ValueError: the file is missing, broken, or of another PEFT method.
    """
    file = Path(directory) / CONFIG_NAME
    try:
        values = json.loads(file.read_text())
        method = values.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{file}: not a readable adapter configuration: {error}") from error
    if method != "IDLORA":
        raise ValueError(f"{file}: peft_type must be IDLORA, got {method}")
    config = IdLoraConfig.from_peft_type(**values)
    assert isinstance(config, IdLoraConfig)
    return config


def write(directory: str | os.PathLike[str], config: PeftConfig, tensors: dict[str, Tensor], card: str) -> None:
    """Write a configuration and its tensors as PEFT does, and a model card; nothing is left half-written.

    A ``README.md`` that is there already is somebody's, and stays.
    """
    os.makedirs(directory, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as partial:
        config.save_pretrained(partial)
        save_file(tensors, os.path.join(partial, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
        Path(partial, CARD_NAME).write_text(card, encoding="utf-8")
        written = [SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME]
        for file in written if Path(directory, CARD_NAME).exists() else [*written, CARD_NAME]:
            os.replace(os.path.join(partial, file), os.path.join(directory, file))
