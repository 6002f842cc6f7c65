"""``to_lora``: a static router's adapter as a plain LoRA, for PEFT without this package."""

from __future__ import annotations

import os
import re
import statistics

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..base import sharding
from ..base.experts import ExpertLinear
from ..base.weight import stored
from ..layer.config import IdLoraConfig
from ..layer.layer import IdLoraLayer
from ..tuner.files import write
from ..tuner.names import PREFIX, adapted_layers, clean
from ..tuner.verify import HOLDER
from .checkpoint import adapter_state


def to_lora(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Write ``lora_A = sum_i a_i A_i [r, d_in]`` and ``lora_B = scaling * diag(B, .., B) [d, r]`` for PEFT.

    Of a centred adapter also ``lora_B.bias = lora_B c``, ``c = sum_i a_i (b - m)[index_i]`` (PEFT's ``lora_bias``).

    The update of arXiv 2602.20727, eq. 4, is a LoRA of rank ``r`` if ``a_i`` are constants (``A_i = W[index_i]``, its
    rows scaled if ``row_scale``). The directory holds
    ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT writes them, in float32 (float64 if ``W`` is),
    ``modules_to_save`` included; nothing is left half-written. The model is not changed and may have merged adapters.

    A LoRA file is larger than the adapter it is made from, ``(d_in + d) r`` values a layer, and training it further is
    training a LoRA. Of a quantised base ``W`` is read dequantised, so that there the two agree to its precision.

    Args:
        model: with an adapter of ``router="static"``, made by any of the doors.
        directory: is created.
        adapter_name: the adapter to export, active or not.

    Raises:
        ValueError: the model has no such adapter, its router is not static, its tensors are still to be loaded, ``W``
            is sharded or on the meta device, or it is in fused experts, where plain PEFT has no layer. Nothing is
            written.
        OSError: the directory cannot be written.
    """
    config, others = adapter_state(model, adapter_name)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = adapted_layers(base, adapter_name)
    for name, layer in layers.items():
        linear = layer.get_base_layer()
        if isinstance(linear, ExpertLinear):
            raise ValueError(f"layer {name!r} is an expert of fused parameters, for which plain PEFT has no layer: "
                             "keep the adapter attached, or use merge_and_unload()")  # fmt: skip
        if sharding.is_sharded(stored(linear)) or stored(linear).is_meta:
            raise ValueError(f"layer {name!r} has a W that is sharded or on the meta device: save the adapter, and "
                             "export it from a model that is loaded whole in one process")  # fmt: skip
    tensors = {key: tensor for key, tensor in others.items() if HOLDER not in key}
    for name, layer in layers.items():
        A, B, c = layer.lora_factors(adapter_name)
        lora_B = torch.block_diag(*[B] * (len(A) // B.shape[1]))
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A.cpu()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = lora_B.cpu()
        if c is not None:
            tensors[f"{PREFIX}{name}.lora_B.bias"] = (lora_B @ c).cpu()
    write(directory, _lora_config(config, base, layers, adapter_name), tensors)


def _lora_config(
    config: IdLoraConfig, base: nn.Module, layers: dict[str, IdLoraLayer], adapter_name: str
) -> LoraConfig:
    ranks = {name: layer.idlora_adapter[adapter_name].index.shape[1] for name, layer in layers.items()}
    r = statistics.mode(ranks.values())
    # Anchored: a pattern of PEFT's also matches every longer name that ends with it.
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r}
    return LoraConfig(
        r=r,
        lora_alpha=r,  # PEFT's scaling is lora_alpha / r: ours is in lora_B
        rank_pattern=others,
        alpha_pattern=dict(others),
        lora_bias=config.center,
        target_modules=_targets(base, set(layers)),
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values()),
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        auto_mapping=config.auto_mapping,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )


def _targets(base: nn.Module, names: set[str]) -> list[str] | str:
    """The last parts of the names, as every reader of LoRA files knows them, if they mean these layers alone."""
    short = {name.rpartition(".")[2] for name in names}
    inside = tuple(f"{name}." for name in names)
    also = {clean(name) for name, _ in base.named_modules() if not name.startswith(inside)}
    if {name for name in also if name.rpartition(".")[2] in short} == names:
        return sorted(short)
    return "|".join(map(re.escape, sorted(names)))
