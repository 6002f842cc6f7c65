"""A file's tensors against a model: all checks before any tensor is copied."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, get_args

from torch import Tensor, nn

from ..base.peft_internals import AuxiliaryTrainingWrapper
from ..layer.config import BaseMismatch, IdLoraConfig
from ..layer.layer import IdLoraLayer
from ..rows.fingerprint import difference
from .files import TENSORS, read_tensors
from .names import PREFIX
from .restore import ModelState


def verify_transformers_load(model: nn.Module, before: ModelState, verify: Callable[[dict[str, Any]], None]) -> None:
    """Have the next loading of tensors into ``model`` checked, and undone if they do not fit.

    ``PreTrainedModel.load_adapter`` injects the adapter, then calls ``self._load_pretrained_model(model=, state_dict=,
    checkpoint_files=, ...)``, and only logs tensors that are missing or unexpected. It has no hook in between, so this
    puts one on the instance; it removes itself when it is called.
    """
    loader = getattr(type(model), "_load_pretrained_model", None)
    if loader is None:
        return

    def checked(**arguments: Any) -> Any:

        forget_transformers_load(model)
        try:
            tensors = arguments["state_dict"]
            if tensors is None:
                tensors = {key: t for file in arguments["checkpoint_files"] for key, t in read_tensors(file).items()}
            verify(tensors)
            return loader(**arguments)
        except BaseException:
            before.restore()
            raise

    vars(model)["_load_pretrained_model"] = checked


def forget_transformers_load(model: nn.Module) -> None:
    """Take the hook of :func:`verify_transformers_load` off again."""
    vars(model).pop("_load_pretrained_model", None)


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
