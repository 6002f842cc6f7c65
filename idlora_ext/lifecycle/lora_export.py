"""``to_lora``: a static router's adapter as a plain LoRA, for PEFT without this package."""

from __future__ import annotations

import os
import re

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..base import sharding
from ..base.experts import ExpertLinear
from ..base.weight import parameter_dtype, stored
from ..layer.config import IdLoraConfig
from ..layer.layer import IdLoraLayer
from ..tuner.files import write
from ..tuner.names import PREFIX, adapted_layers, clean
from ..tuner.verify import HOLDER
from .checkpoint import adapter_state
from .model_card import model_card

SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank takes


def to_lora(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    dtype: torch.dtype | None = None,
    pad: bool = False,
) -> None:
    """Write ``lora_A = sum_i a_i A_i [r, d_in]`` and ``lora_B = scaling * diag(B, .., B) [d, r]`` for PEFT.

    Of a centred adapter also ``lora_B.bias = lora_B c``, ``c = sum_i a_i (b - m)[index_i]`` (PEFT's ``lora_bias``).

    The update of arXiv 2602.20727, eq. 4, is a LoRA of rank ``r`` if ``a_i`` are constants (``A_i = W[index_i]``, its
    rows scaled if ``row_scale``). The directory holds ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT
    writes them, ``modules_to_save`` included, and a ``README.md`` that says how to load them; nothing is left
    half-written. The model is not changed and may have merged adapters.

    All layers get one rank, that of the widest, and ``lora_alpha`` is that rank: factors of a narrower layer are filled
    up with zeros, which change nothing. Other readers know one rank only, and scale by it.

    A LoRA file is larger than the adapter it is made from, ``(d_in + d) r`` values a layer, and training it further is
    training a LoRA. Of a quantised base ``W`` is read dequantised, so that there the two agree to its precision.

    Args:
        model: with an adapter of ``router="static"``, made by any of the doors.
        directory: is created.
        adapter_name: the adapter to export, active or not.
        dtype: of the LoRA; by default the base model's. Products are summed in float32 (float64 if ``W`` is) and
            rounded once.
        pad: fill up to the next rank that vLLM can be started with: 8, 16, 32, 64, 128, 256, 320 or 512.

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
    r = max(layer.idlora_adapter[adapter_name].index.shape[1] for layer in layers.values())
    if pad:
        r = next((served for served in SERVED_RANKS if served >= r), r)
    tensors = {key: tensor for key, tensor in others.items() if HOLDER not in key}
    for name, layer in layers.items():
        A, B, c = layer.lora_factors(adapter_name)
        lora_B = torch.block_diag(*[B] * (len(A) // B.shape[1]))
        missing = r - len(A)
        factors = {"lora_A.weight": F.pad(A, (0, 0, 0, missing)), "lora_B.weight": F.pad(lora_B, (0, missing))}
        if c is not None:
            factors["lora_B.bias"] = lora_B @ c
        wanted = dtype or parameter_dtype(layer.get_base_layer())
        tensors |= {f"{PREFIX}{name}.{key}": tensor.to("cpu", wanted) for key, tensor in factors.items()}
    lora = _lora_config(config, base, layers, r)
    write(directory, lora, tensors, model_card(lora))


def _lora_config(config: IdLoraConfig, base: nn.Module, layers: dict[str, IdLoraLayer], r: int) -> LoraConfig:
    return LoraConfig(
        r=r,
        lora_alpha=r,  # PEFT's scaling is lora_alpha / r: ours is in lora_B
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
