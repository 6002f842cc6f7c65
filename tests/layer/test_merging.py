"""Merging a static router into ``W`` and taking it out again: PEFT's methods, on every kind of layer."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import idlora_ext
from idlora_ext import IdLoraConfig
from tests.helpers.models import (
    CLOSE,
    FIELDS,
    MODELS,
    PLAIN,
    adapted_static,
    assert_unchanged,
    layers_of,
    logits,
    randomize_static,
    tiny_llama,
    weights,
)
from tests.helpers.problems import every_pair, named

STATIC = FIELDS | {"router": "static"}


@every_pair(kind=named(PLAIN), shared=named([True, False]), safe=named([False, True]))
def test_merged_unmerged_and_unloaded(kind, shared, safe):
    model = adapted_static(kind, shared_router=shared, scaling=0.7)
    base, expected, before = logits(MODELS[kind].make().double()), logits(model), weights(model)
    assert (expected - base).abs().max() > 1e-3
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    assert model.get_model_status().merged_adapters == ["default"]
    for layer in layers_of(model).values():
        h = torch.randn(3, layer.in_features, dtype=torch.float64)
        assert torch.equal(layer(h), layer.base_layer(h))
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert_unchanged(model, before)
    assert torch.equal(logits(model), expected)
    merged = model.merge_and_unload(safe_merge=safe)
    assert not layers_of(merged)
    assert type(merged) is type(MODELS[kind].make())
    assert merged.state_dict().keys() == MODELS[kind].make().state_dict().keys()
    torch.testing.assert_close(logits(merged), expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_once(dtype):
    model = adapted_static(dtype=dtype, shared_router=False)
    model.add_adapter("second", IdLoraConfig(**STATIC, seed=5))
    randomize_static(model, "second", seed=5)
    originals = {name: layer.base_layer.weight.clone() for name, layer in layers_of(model).items()}
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging second"):
        model.merge_adapter(["second"])
    for name, layer in layers_of(model).items():
        W = originals[name].double()
        delta = torch.zeros_like(W)
        for adapter in ("default", "second"):
            index, B = layer.idlora_adapter[adapter].index.long(), layer.idlora_adapter[adapter].B.double()
            a = layer.idlora_adapter[adapter].router.double().expand(2)
            delta += torch.block_diag(B, B) @ sum(a[i] * W[index[i]] for i in range(2))
        exact, weight = W + delta, layer.base_layer.weight
        assert weight.dtype == dtype
        half_a_step = exact.abs() * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).smallest_normal * 2**-7
        assert ((weight.double() - exact).abs() <= half_a_step + 1e-6 * exact.abs().max()).all()
        assert torch.equal(layer.get_base_weight(), originals[name])
    model.unmerge_adapter()
    for name, layer in layers_of(model).items():
        assert torch.equal(layer.base_layer.weight, originals[name])


def test_several_adapters_sum_and_all_read_the_original_rows():
    model = adapted_static()
    model.add_adapter("second", IdLoraConfig(**STATIC, shared_router=False, seed=5))
    randomize_static(model, "second", seed=5)
    model.base_model.set_adapter(["default", "second"])
    expected, before = logits(model), weights(model)
    model.merge_adapter(["second"])
    with pytest.warns(UserWarning, match="additionally merging default"):
        model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    model.unmerge_adapter()
    assert_unchanged(model, before)
    torch.testing.assert_close(logits(model.merge_and_unload(adapter_names=["default", "second"])), expected, **CLOSE)


@pytest.mark.parametrize("router", ["static", "linear"])
def test_adding_loading_and_saving_while_merged_read_the_original(tmp_path, router):
    model = adapted_static()
    expected = logits(model)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    second = IdLoraConfig(**FIELDS | {"router": router}, seed=5)
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.add_adapter("second", second)
    fresh = idlora_ext.apply(tiny_llama().double(), second)
    for name, layer in layers_of(model).items():
        other = layers_of(fresh)[name]
        for kind in ("index", "router", "fingerprint"):
            one, two = layer.idlora_adapter["second"], other.idlora_adapter["default"]
            assert torch.equal(getattr(one, kind), getattr(two, kind))
    assert torch.equal(logits(idlora_ext.load(tiny_llama().double(), tmp_path)), expected)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.load_adapter(tmp_path, "third")  # the fingerprint is that of the original W
    model.set_adapter("third")
    assert torch.equal(logits(model), expected)


def test_disabling_deleting_and_removing_restore_the_base_bit_for_bit():
    base = logits(tiny_llama().double())
    model = adapted_static()
    expected = logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), expected)
    model.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")
    assert torch.equal(logits(copy.deepcopy(model).unload()), base)
    assert torch.equal(logits(idlora_ext.remove(model)), base)


def test_in_a_model_without_peft_model():
    model = randomize_static(idlora_ext.apply(tiny_llama().double(), **STATIC))
    expected = logits(model)
    for layer in layers_of(model).values():
        layer.merge(safe_merge=True)
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    model.disable_adapters()
    assert torch.equal(logits(model), logits(tiny_llama().double()))


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_refused_before_any_layer_changes(method):
    def refused(model, match, error=ValueError, **arguments):
        before = weights(model)
        with pytest.raises(error, match=match):
            getattr(model, method)(**arguments)
        assert_unchanged(model, before)
        assert not any(layer.merged for layer in layers_of(model).values())
        assert len(layers_of(model)) == 14

    model = adapted_static()
    refused(model, "no adapter 'x' to merge; the model has", adapter_names=["default", "x"])
    refused(model, "should be a list of strings", TypeError, adapter_names="default")
    last = list(layers_of(model).values())[-1]
    with torch.no_grad():
        last.idlora_adapter["default"].B[0, 0] = torch.inf
    refused(
        model,
        f"layer '{last.name}': NaNs detected in the merged weights. The adapter default seems to be broken",
        safe_merge=True,
    )
    model = adapted_static()
    model.add_adapter("linear", IdLoraConfig(**FIELDS | {"target_modules": ["down_proj"]}))
    linear = "layer 'model.layers.0.mlp.down_proj', adapter 'linear': .*depend on the token.*router=\"static\""
    refused(model, linear, adapter_names=["default", "linear"])
    model.base_model.disable_adapter_layers()
    refused(model, "the adapters are disabled: enable them first")
    model = adapted_static()
    last = list(layers_of(model).values())[-1]
    nn.utils.parametrizations.orthogonal(last.base_layer)
    refused(model, f"layer '{last.name}' cannot be merged: W is computed from other parameters")


def quantise(layer):
    layer.quantization_backend = object()


def shard(layer):
    layer.base_layer.weight.ds_shape = layer.base_layer.weight.shape  # DeepSpeed's mark


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (quantise, "W is quantised: keep the adapter attached"),
        (shard, "W is sharded over several processes"),
        (lambda layer: layer.base_layer.to("meta"), "W is on the meta device"),
    ],
)
@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_weights_that_cannot_take_the_update_are_refused(change, match, method):
    model = adapted_static()
    layers = list(layers_of(model).values())
    before = weights(layers[0])
    change(layers[-1])
    with pytest.raises(ValueError, match=f"layer '{layers[-1].name}' cannot be merged: {match}"):
        getattr(model, method)()
    assert_unchanged(layers[0], before)
    assert not any(layer.merged for layer in layers)


def test_float16_overflow_is_found_by_safe_merge():
    model = adapted_static(dtype=torch.float16)
    layer = next(iter(layers_of(model).values()))
    with torch.no_grad():
        layer.idlora_adapter["default"].B.fill_(1e7)
    with pytest.raises(ValueError, match="float16 does not hold the sum"):
        model.merge_adapter(safe_merge=True)


def test_tied_weights_are_refused():
    model = randomize_static(get_peft_model(tiny_llama(tie_word_embeddings=True), IdLoraConfig(**STATIC | HEAD)))
    before = weights(model)
    with pytest.raises(ValueError, match=r"its weight is that of model\.embed_tokens, lm_head.*Untie"):
        model.merge_adapter()
    assert_unchanged(model, before)


HEAD = {"target_modules": ["lm_head", "q_proj"], "r": 8, "rank_boost": 1}


def test_experts_are_views_of_fused_parameters():
    base = MODELS["moe"].make()
    model = randomize_static(get_peft_model(MODELS["moe"].make(), IdLoraConfig(**STATIC)))
    assert any(name.endswith("experts.3.down_proj") for name in layers_of(model))
    expected, before = logits(model), weights(model)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(base), rtol=1e-4, atol=1e-5)
    assert_unchanged(model, before)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert not torch.equal(merged.model.layers[1].mlp.experts.down_proj, base.model.layers[1].mlp.experts.down_proj)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # Conv1D stores its weight the other way round
def test_peft_converts_a_static_router_to_lora(kind):
    from peft import convert_to_lora, set_peft_model_state_dict

    model = adapted_static(kind, shared_router=False)
    config, tensors = convert_to_lora(model, rank=8)
    lora = get_peft_model(MODELS[kind].make().double(), config).eval()
    set_peft_model_state_dict(lora, tensors)
    assert isinstance(config, LoraConfig)
    torch.testing.assert_close(logits(lora), logits(model), rtol=1e-3, atol=1e-3)
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(get_peft_model(tiny_llama(), IdLoraConfig(**FIELDS)), rank=8)
