"""Adapters on disk: what is written, and everything that is checked before a model is touched.

A directory under PEFT's file names: ``adapter_config.json`` and ``adapter_model.safetensors``, which holds, for each
adapted layer, ``idlora_index``, ``idlora_router``, ``idlora_B``, ``idlora_fingerprint`` and, with ``row_scale``,
``idlora_row_scale``, with ``center``, ``idlora_mean``. Loading never clusters.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import distributed
from .config import BaseMismatch, IdLoraConfig
from .fingerprint import difference
from .integration import AuxiliaryTrainingWrapper
from .layer import IdLoraLayer

TENSORS = ("idlora_index", "idlora_router", "idlora_B", "idlora_fingerprint", "idlora_row_scale", "idlora_mean")
PREFIX = "base_model.model."


def verify(model: nn.Module, config: IdLoraConfig, adapter_name: str, tensors: dict[str, Tensor]) -> None:
    """Check that ``tensors`` are exactly those of an adapter that is in the model, and of this very base model.

    On success the adapter's layers take over the dtypes of the file and count as loaded; on failure nothing changes.

    Args:
        model: holds the adapter's layers, by PEFT's names (with or without ``base_model.model.``).
        config: the adapter's; ``base_mismatch="warn"`` turns a wrong base into a warning.
        adapter_name: its name in the model.
        tensors: from the file, by its names (without the adapter's).

    Raises:
        ValueError: naming the tensors or the first layer that does not fit.
    """
    if config.base_mismatch not in get_args(BaseMismatch):
        raise ValueError(
            f"base_mismatch must be one of {', '.join(get_args(BaseMismatch))}, got {config.base_mismatch!r}"
        )
    layers = {
        name.removeprefix(PREFIX).removesuffix(".base_layer"): module  # of another tuner, put around it since
        for name, module in model.named_modules()
        if isinstance(module, IdLoraLayer) and adapter_name in module.idlora_B
    }
    found: dict[str, dict[str, Tensor]] = {}
    unexpected = []
    known = {name.removeprefix(PREFIX): tensor.shape for name, tensor in model.state_dict().items()}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        layer, _, tensor_name = name.rpartition(".")
        if layer in layers and tensor_name in TENSORS and adapter_name in getattr(layers[layer], tensor_name):
            found.setdefault(layer, {})[tensor_name] = tensor
        elif name not in known and not _belongs_to_saved_module(model, name):
            unexpected.append(key)
        elif name in known and known[name].numel() and tensor.shape != known[name]:  # such as a resized embedding
            raise ValueError(f"{name}: the file has shape {list(tensor.shape)}, the model {list(known[name])}")
    missing = [
        f"{name}.{t}"
        for name, layer in layers.items()
        for t in TENSORS
        if adapter_name in getattr(layer, t) and t not in found.get(name, {})
    ]
    if missing:
        raise ValueError(f"the adapter's file lacks {len(missing)} tensors that the model needs: {_some(missing)}")
    if unexpected:
        raise ValueError(f"the adapter's file has {len(unexpected)} tensors that the model has no place for: "
                         f"{_some(unexpected)}")  # fmt: skip

    for name, layer in layers.items():
        reason = difference(found[name]["idlora_fingerprint"], layer.idlora_fingerprint[adapter_name])
        if reason is not None:
            message = (
                f"the adapter was made from another base model; the first layer that differs is {name!r}: {reason}"
            )
            if config.base_mismatch == "error" or "shape" in reason:
                raise ValueError(f'{message}. Load the right base, or set base_mismatch="warn" to go on regardless.')
            warnings.warn(message, stacklevel=2)
            break
    for name, layer in layers.items():
        _verify_layer(name, layer, adapter_name, found[name])

    for name, layer in layers.items():
        for parameters in (layer.idlora_router, layer.idlora_B):
            stored = found[name]["idlora_B" if parameters is layer.idlora_B else "idlora_router"]
            if adapter_name in layer.pending and parameters[adapter_name].dtype != stored.dtype:
                old = parameters[adapter_name]
                parameters[adapter_name] = nn.Parameter(old.data.to(stored.dtype), requires_grad=old.requires_grad)
        layer.pending.discard(adapter_name)
        if adapter_name in layer.centered:
            layer.centered[adapter_name] = False  # of one that was saved before its first step the mean is to be taken


def _verify_layer(name: str, layer: IdLoraLayer, adapter_name: str, tensors: dict[str, Tensor]) -> None:
    for tensor_name, tensor in tensors.items():
        expected = getattr(layer, tensor_name)[adapter_name]
        if tensor.shape != expected.shape:
            raise ValueError(
                f"{name}.{tensor_name}: the file has shape {list(tensor.shape)}, the model {list(expected.shape)}"
            )
        if tensor.dtype.is_floating_point != expected.dtype.is_floating_point:
            raise ValueError(f"{name}.{tensor_name}: the file has {tensor.dtype}, the model {expected.dtype}")
    index = tensors["idlora_index"].flatten().long()
    d = layer.out_features
    if index.min() < 0 or index.max() >= d:
        raise ValueError(f"{name}.idlora_index: entries must lie in [0, {d}), got {index.min()} to {index.max()}")
    if index.unique().numel() != index.numel():
        raise ValueError(f"{name}.idlora_index: entries must be distinct, and some occur more than once")
    scale = tensors.get("idlora_row_scale")
    if scale is not None and not (scale.isfinite() & (scale >= 0)).all():
        raise ValueError(f"{name}.idlora_row_scale: entries must be finite and not negative")
    if "idlora_mean" in tensors and not tensors["idlora_mean"].isfinite().all():
        raise ValueError(f"{name}.idlora_mean: entries must be finite")


def _belongs_to_saved_module(model: nn.Module, name: str) -> bool:
    """Whether a tensor is of a module that PEFT saves in full (``modules_to_save``), under its original name."""
    return any(
        name.startswith(path.removeprefix(PREFIX) + ".")
        for path, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
    )


def _some(names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


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


def save(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Write an adapter to a directory, for any ``nn.Module``; nothing is left half-written.

    A transformers model's own ``save_pretrained`` writes the same two files. All ranks must save a sharded model;
    rank 0 writes, and all return when the files are there.

    Raises:
        OSError: the directory cannot be written (on every rank of a sharded model).
        ValueError: the model has no such adapter, or its tensors are still to be loaded.
    """
    config, tensors = adapter_state(model, adapter_name)
    if any(map(distributed.is_sharded, model.parameters())):
        distributed.on_first_rank(lambda: write(directory, config, tensors))
    else:
        write(directory, config, tensors)


def adapter_state(model: nn.Module, adapter_name: str) -> tuple[IdLoraConfig, dict[str, Tensor]]:
    """An adapter's configuration, and its tensors under the names they have in its file."""
    holder = model.base_model if isinstance(model, PeftModel) else model
    config = getattr(holder, "peft_config", {}).get(adapter_name)
    if not isinstance(config, IdLoraConfig):
        raise ValueError(f"save: the model has no ID-LoRA adapter {adapter_name!r}")
    for name, module in model.named_modules():
        if isinstance(module, IdLoraLayer) and adapter_name in module.pending:
            raise ValueError(f"save: layer {name!r} of adapter {adapter_name!r} has no rows yet: load or choose them")
    with distributed.gathered(model, f".{adapter_name}"):
        tensors = get_peft_model_state_dict(model, adapter_name=adapter_name)
        return config, {PREFIX + key.removeprefix(PREFIX): _for_file(t) for key, t in tensors.items()}


def _for_file(tensor: Tensor) -> Tensor:
    return distributed.full(tensor.detach()).cpu().contiguous()


def write(directory: str | os.PathLike[str], config: PeftConfig, tensors: dict[str, Tensor]) -> None:
    """Write a configuration and its tensors as PEFT does; nothing is left half-written."""
    os.makedirs(directory, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as partial:
        config.save_pretrained(partial)
        save_file(tensors, os.path.join(partial, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
        for file in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME):
            os.replace(os.path.join(partial, file), os.path.join(directory, file))


def load(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    base_mismatch: BaseMismatch = "error",
) -> nn.Module:
    """Load an adapter into any ``nn.Module``, in place, and make it the active one. It never clusters.

    A transformers model's ``load_adapter`` and ``PeftModel.from_pretrained`` read the same files with the same checks.
    An adapter of that name that is in the model already has its tensors replaced.

    Args:
        model: the base model the adapter was made from, or a model that has an adapter of this shape.
        directory: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        adapter_name: the name the adapter gets in this model.
        is_trainable: keep training it; by default it is frozen, and the model is put into evaluation mode.
        base_mismatch: ``"error"``, or ``"warn"`` to go on with a base model that is not the adapter's.

    Returns:
        The same object.

    Raises:
        ValueError: a file, tensor or base model that does not fit, naming it. The model is then as it was before.
    """
    from .patching import inject

    config = read_config(directory)
    tensors = read_tensors(Path(directory) / SAFETENSORS_WEIGHTS_NAME)
    if not isinstance(model, PeftModel):  # PEFT looks for modules_to_save under the model's own names
        tensors = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    config.base_mismatch = base_mismatch
    config.inference_mode = not is_trainable
    if _has_adapter(model, adapter_name):
        holder: Any = model.base_model if isinstance(model, PeftModel) else model
        present = holder.peft_config[adapter_name]
        for name in ("scaling", "router"):
            if (theirs := getattr(config, name)) != (ours := getattr(present, name)):
                raise ValueError(
                    f"load: the file's {name} is {theirs}, that of adapter {adapter_name!r} in the model {ours}: its "
                    "tensors would mean something else. Remove the adapter first, or load under another adapter_name."
                )
        present.base_mismatch = base_mismatch
        set_peft_model_state_dict(model, tensors, adapter_name=adapter_name)
        return model
    if isinstance(model, PeftModel):
        raise TypeError("load: the model is a PeftModel; use model.load_adapter(directory, adapter_name)")
    inject(model, config, adapter_name, tensors=tensors)
    if not is_trainable:
        model.eval()
    return model


def loadable_in_place(model: nn.Module, directory: str | None) -> bool:
    """Whether the directory holds an adapter, and the model ID-LoRA layers outside a ``PeftModel``."""
    if directory is None or isinstance(model, PeftModel):
        return False
    has_files = all(os.path.isfile(os.path.join(directory, f)) for f in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME))
    return has_files and any(isinstance(module, IdLoraLayer) for module in model.modules())


def _has_adapter(model: nn.Module, adapter_name: str) -> bool:
    return any(isinstance(module, IdLoraLayer) and adapter_name in module.idlora_B for module in model.modules())
