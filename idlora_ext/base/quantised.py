"""Packed weights: PEFT's backends that read them, how many parameters they count for, and where no gradient passes."""

from __future__ import annotations

from typing import Any

from torch import nn

from .peft_internals import QuantizationBackend, resolve_quantization_backend


def quantization_backend(base_layer: nn.Module, arguments: dict[str, Any]) -> QuantizationBackend | None:
    """PEFT's object for reading and writing the weights of a quantised layer, None for any other layer.

    For torchao, PEFT insists on knowing how to quantise again, which only a model from transformers' quantiser can
    tell (``get_quantization_kwargs``), and which is needed for nothing but merging.
    """

    def unknown() -> Any:
        raise ValueError("merging into torchao weights needs a model that transformers has quantised (TorchAoConfig)")

    return resolve_quantization_backend(base_layer, **({"get_apply_tensor_subclass": unknown} | arguments))


def parameter_count(parameter: nn.Parameter) -> int:
    """Entries of a parameter; of bitsandbytes' packed 4-bit weights two in a byte, as PEFT counts."""
    if type(parameter).__name__ != "Params4bit":
        return parameter.numel()
    return parameter.numel() * parameter.itemsize * 2


def packed_for_inference(layer: nn.Module) -> bool:
    """Whether bitsandbytes has rearranged the 4-bit weights of a layer.

    It does so on CPUs with AVX512-BF16, in the first evaluation without gradients. Its own dequantisation then returns
    something else without an error, and no gradient passes. Relies on its flag in ``quant_state``.
    """
    return getattr(getattr(getattr(layer, "weight", None), "quant_state", None), "packing_format_for_cpu", False)


def refuse_training_through_packed(name: str, layer: nn.Module) -> None:
    """Refuse to train on above a layer through which bitsandbytes would silently pass no gradient."""
    if packed_for_inference(layer):
        raise ValueError(
            f"layer {name!r}: bitsandbytes has packed its 4-bit weights for inference on this CPU, in an evaluation "
            "without gradients, and passes no gradient through them. Set support_avx512bf16_for_cpu = False on every "
            "bitsandbytes Linear4bit of a freshly loaded model before its first evaluation."
        )
