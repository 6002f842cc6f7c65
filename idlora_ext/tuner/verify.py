"""A file's tensors against a model: sorted (``match``), checked (``check``), and only then changed (``accept``).

Accepted are the tensors of the adapter, those of its own saved modules (``modules_to_save``, trained tokens), and the
weights of the model's embeddings, which PEFT writes where they were resized. Nothing else of a base model can be
overwritten by a file.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

from torch import Tensor, nn

from ..base.peft_internals import AuxiliaryTrainingWrapper
from ..layer.config import BaseMismatch, IdLoraConfig
from ..layer.layer import IdLoraLayer
from ..rows.fingerprint import difference
from .files import read_tensors
from .names import adapted_layers, clean
from .restore import ModelState

HOLDER = ".idlora_adapter."  # what stands between a layer's name and a tensor's in a file

Tensors = Mapping[str, Tensor]


def verify(model: nn.Module, config: IdLoraConfig, adapter_name: str, tensors: Tensors) -> None:
    """Make sure that ``tensors`` are exactly those of an adapter that is in the model, and of this very base model.

    On success the adapter's layers take over the dtypes of the file and count as loaded; on failure nothing changes.

    Args:
        model: holds the adapter's layers, by PEFT's names (with or without ``base_model.model.``).
        config: the adapter's; ``base_mismatch="warn"`` turns a wrong base into a warning.
        adapter_name: its name in the model.
        tensors: from the file, by its names (without the adapter's).

    Raises:
        ValueError: naming the tensors or the first layer that does not fit.
    """
    layers = adapted_layers(model, adapter_name)
    found = match(model, layers, adapter_name, tensors)
    check(layers, config, adapter_name, found)
    accept(layers, adapter_name, found)


def match(
    model: nn.Module, layers: Mapping[str, IdLoraLayer], adapter_name: str, tensors: Tensors
) -> dict[str, dict[str, Tensor]]:
    """The file's tensors by layer and name.

    Raises:
        ValueError: tensors are missing, have no place in the model, or are of a saved module of another shape.
    """
    wanted = {name: [*layer.idlora_adapter[adapter_name].state_dict()] for name, layer in layers.items()}
    others = _saved(model, adapter_name) | _embeddings(model)
    found: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
    unexpected = []
    for key, tensor in tensors.items():
        layer, _, name = clean(key).rpartition(HOLDER)
        if name in wanted.get(layer, ()):
            found[layer][name] = tensor
            continue
        present = others.get(clean(key))
        if present is None:
            unexpected.append(key)
        elif present.numel() and tensor.shape != present.shape:  # such as a resized embedding
            raise ValueError(f"{clean(key)}: the file has shape {list(tensor.shape)}, the model {list(present.shape)}")
    missing = [f"{layer}{HOLDER}{n}" for layer, names in wanted.items() for n in names if n not in found[layer]]
    if missing:
        raise ValueError(f"the adapter's file lacks {len(missing)} tensors that the model needs: {_some(missing)}")
    if unexpected:
        raise ValueError(
            f"the adapter's file has {len(unexpected)} tensors that the model has no place for: {_some(unexpected)}"
        )
    return found


def _saved(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The tensors of modules that the adapter trains in full, and of its trained tokens, by their names in a file."""
    tensors = {}
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            held = module.state_dict()
            for in_file, in_module in module.adapter_state_dict_load_map(adapter_name).items():
                for name in (in_file, in_module):  # PEFT renames them before it asks, transformers after it
                    tensors[clean(f"{path}.{name}")] = held[in_module]
    return tensors


def _embeddings(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the input and the output embedding, which PEFT saves if they were resized or are targeted."""
    embeddings = []
    for ask in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(AttributeError, NotImplementedError):  # a model without
            embedding = getattr(model, ask)()
            embeddings += [embedding, *(getattr(embedding, name, None) for name in ("base_layer", "original_module"))]
    return {
        clean(f"{path}.{name}"): tensor
        for path, module in model.named_modules(remove_duplicate=False)
        if any(module is embedding for embedding in embeddings)
        for name, tensor in module.named_parameters(recurse=False)
    }


def check(
    layers: Mapping[str, IdLoraLayer], config: IdLoraConfig, adapter_name: str, found: Mapping[str, Tensors]
) -> None:
    """Whether the base model is the one that the tensors were made from, and all values can be what they are said to.

    Raises:
        ValueError: naming the first layer that does not fit, unless it is the base and ``base_mismatch="warn"``.
    """
    if config.base_mismatch not in get_args(BaseMismatch):
        raise ValueError(
            f"base_mismatch must be one of {', '.join(get_args(BaseMismatch))}, got {config.base_mismatch!r}"
        )
    for name, layer in layers.items():
        reason = difference(found[name]["fingerprint"], layer.idlora_adapter[adapter_name].fingerprint)
        if reason is not None:
            message = (
                f"the adapter was made from another base model; the first layer that differs is {name!r}: {reason}"
            )
            if config.base_mismatch == "error" or "shape" in reason:
                raise ValueError(f'{message}. Load the right base, or set base_mismatch="warn" to go on regardless.')
            warnings.warn(message, stacklevel=2)
            break
    for name, layer in layers.items():
        layer.idlora_adapter[adapter_name].check(found[name], f"{name}{HOLDER}")


def accept(layers: Mapping[str, IdLoraLayer], adapter_name: str, found: Mapping[str, Tensors]) -> None:
    """Get the layers ready for tensors that have been checked, and are about to be copied into them."""
    for name, layer in layers.items():
        layer.idlora_adapter[adapter_name].accept(found[name])


def _some(names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


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
