"""``save`` and ``load``: an adapter on disk, under PEFT's file names. Loading never chooses rows.

``adapter_model.safetensors`` holds all tensors of the :class:`~idlora_ext.layer.adapter.Adapter` of each layer, as
``<layer>.idlora_adapter.<tensor>``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from ..base import sharding
from ..layer.config import BaseMismatch, IdLoraConfig
from ..tuner.files import read_config, read_tensors, write
from ..tuner.names import PREFIX, adapted_layers
from .apply import inject
from .model_card import model_card


def save(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Write an adapter to a directory, for any ``nn.Module``; nothing is left half-written.

    A transformers model's own ``save_pretrained`` writes the same two files. Here a ``README.md`` says how to load
    them, if there is none yet. All ranks must save a sharded model; rank 0 writes, and all return when the files are
    there.

    Raises:
        OSError: the directory cannot be written (on every rank of a sharded model).
        ValueError: the model has no such adapter, or its tensors are still to be loaded.
    """
    config, tensors = adapter_state(model, adapter_name)
    card = model_card(config)
    if any(map(sharding.is_sharded, model.parameters())):
        sharding.on_first_rank(lambda: write(directory, config, tensors, card))
    else:
        write(directory, config, tensors, card)


def adapter_state(model: nn.Module, adapter_name: str) -> tuple[IdLoraConfig, dict[str, Tensor]]:
    """An adapter's configuration, and its tensors under the names they have in its file."""
    holder = model.base_model if isinstance(model, PeftModel) else model
    config = getattr(holder, "peft_config", {}).get(adapter_name)
    if not isinstance(config, IdLoraConfig):
        raise ValueError(f"save: the model has no ID-LoRA adapter {adapter_name!r}")
    for name, layer in adapted_layers(model, adapter_name).items():
        if layer.idlora_adapter[adapter_name].pending:
            raise ValueError(f"save: layer {name!r} of adapter {adapter_name!r} has no rows yet: load or choose them")
    with sharding.gathered(model, f".{adapter_name}"):
        tensors = get_peft_model_state_dict(model, adapter_name=adapter_name)
        return config, {PREFIX + key.removeprefix(PREFIX): _for_file(t) for key, t in tensors.items()}


def _for_file(tensor: Tensor) -> Tensor:
    return sharding.full_tensor(tensor.detach()).cpu().contiguous()


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
    config = read_config(directory)
    tensors = read_tensors(Path(directory) / SAFETENSORS_WEIGHTS_NAME)
    if not isinstance(model, PeftModel):  # PEFT looks for modules_to_save under the model's own names
        tensors = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    config.base_mismatch = base_mismatch
    config.inference_mode = not is_trainable
    if adapted_layers(model, adapter_name):
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
    return has_files and bool(adapted_layers(model))
