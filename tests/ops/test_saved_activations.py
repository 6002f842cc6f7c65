"""What the adapters keep for the backward pass, counted in autograd's own storages: ID-LoRA beside LoRA."""

from __future__ import annotations

import pytest
import torch
from bench_saved_activations import LINEARS, LLAMA_3_8B, adapted, decoder_layer, layer_inputs, saved_activations
from peft import LoraConfig
from torch import nn

from idlora_ext import IdLoraConfig

TOKENS = 16
# The true sizes, and every one of them a sixteenth: hidden, feed-forward, head, and the ranks with them.
SCALES = {"full size": 1, "a sixteenth": 16}


def sizes(scale):
    heads = {name: value for name, value in LLAMA_3_8B.items() if name.startswith("num_")}
    return {name: value // scale for name, value in LLAMA_3_8B.items()} | heads


def added(layer, config):
    """What an adapter keeps for backward, per token: the layer with it minus the layer without it."""
    inputs = layer_inputs(layer, TOKENS)
    without = saved_activations(layer, **inputs)
    with adapted(layer, config) as model:
        return saved_activations(model, **inputs).minus(without).per(TOKENS)


def lora(scale=1):
    return LoraConfig(r=32 // scale, target_modules=LINEARS)


def idlora(scale=1):
    return IdLoraConfig(r=128 // scale, target_modules=LINEARS, selection="sequential", router="linear", center=False)


def test_the_accounting_on_a_module_counted_by_hand():
    """Every storage once and whole; no parameters, buffers or arguments."""

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))
            self.register_buffer("buffer", torch.randn(5, 4))

        def forward(self, h, scale):
            h = h @ self.weight.t()  # keeps h, an argument, and weight
            h = (h * scale) * self.buffer  # keeps h @ weight, [5, 4]; scale and buffer are there anyway
            h = h.exp()  # keeps its result, [5, 4] ...
            return h[:2] * h[3:], h.double().sigmoid()  # ... of which two views; the float64 result, [5, 4]

    saved = saved_activations(Module(), torch.randn(5, 3), scale=torch.randn(5, 1, requires_grad=True))
    assert saved == (20 + 20 + 20, 20 * 4 + 20 * 4 + 20 * 8)


def test_nothing_is_kept_without_a_gradient():
    layer = decoder_layer(sizes(16), "sdpa", torch.float32)
    with torch.no_grad():
        assert saved_activations(layer, **layer_inputs(layer, TOKENS)) == (0, 0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_idlora_keeps_x_alone_and_lora_its_inputs(scale, attention):
    """``k r`` of each linear layer against ``d_in`` of each distinct input and ``r``: 3,584 against 26,848 values.

    Fused attention keeps its output, which is the input of ``o_proj``, for itself: there LoRA adds ``d_in`` less.
    """
    layer = decoder_layer(sizes(scale), attention, torch.float32)
    hidden, intermediate = layer.hidden_size, layer.mlp.intermediate_size
    kept_by_lora = added(layer, lora(scale))
    kept_by_idlora = added(layer, idlora(scale))
    distinct_inputs = (3 if attention == "eager" else 2) * hidden + intermediate
    assert kept_by_lora.values == distinct_inputs + 7 * 32 // scale
    assert kept_by_idlora.values == 7 * 4 * 128 // scale
    if scale == 1:
        assert kept_by_lora.values == {"eager": 26_848, "sdpa": 22_752}[attention]
        assert kept_by_idlora.values == 3_584
    if attention == "eager":
        assert kept_by_idlora.values <= 0.14 * kept_by_lora.values
        assert kept_by_idlora.bytes <= 0.14 * kept_by_lora.bytes


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_float32_adapters_of_a_bfloat16_layer(attention):
    """PEFT's default. LoRA casts its input for every layer anew; ID-LoRA keeps ``x`` in the activation's dtype."""
    layer = decoder_layer(sizes(16), attention, torch.bfloat16)
    hidden, intermediate = layer.hidden_size, layer.mlp.intermediate_size
    kept_by_lora = added(layer, lora(16))
    kept_by_idlora = added(layer, idlora(16))
    assert kept_by_lora.bytes == 4 * (6 * hidden + intermediate + 7 * 2)
    assert kept_by_idlora.bytes == 2 * (7 * 4 * 8)
    assert kept_by_idlora.bytes <= 0.14 * kept_by_lora.bytes


@pytest.mark.parametrize(("fields", "kept"), [({"router": "linear"}, 2 * 8), ({}, 8)], ids=["linear", "default"])
def test_what_is_kept_does_not_grow_with_the_input_of_a_layer(fields, kept):
    """An adapter is a function of the base layer's output: ``d_in`` is nowhere in what it keeps. The default keeps
    ``sum_i x_i``, and no mean."""
    values = set()
    for d_in in (8, 512):
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Linear(d_in, 64, bias=False)).requires_grad_(False)
        h = torch.randn(TOKENS, d_in, requires_grad=True)
        config = IdLoraConfig(r=8, num_clusters=2, target_modules=["0"], selection="sequential", **fields)
        with adapted(layer, config) as model:
            values.add(saved_activations(model, h).values / TOKENS)
    assert values == {kept}


@pytest.mark.parametrize(
    "variant", [{"router": "bounded"}, {"router": "bounded", "row_scale": True}, {"row_scale": True}]
)
def test_variants_with_one_weight_for_all_clusters_keep_their_sum(variant):
    layer = nn.Sequential(nn.Linear(512, 64, bias=False)).requires_grad_(False).bfloat16()
    h = torch.randn(TOKENS, 512, dtype=torch.bfloat16, requires_grad=True)
    without = saved_activations(layer, h)
    fields = {"r": 8, "num_clusters": 2, "target_modules": ["0"], "selection": "sequential"}
    with adapted(layer, IdLoraConfig(**fields | variant)) as model:
        assert saved_activations(model, h).minus(without).per(TOKENS).bytes == 2 * 8
