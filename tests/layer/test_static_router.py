"""``router="static"``: ``z = sum_i a_i x_i``, learned constants instead of a product with every token."""

from __future__ import annotations

import copy

import pytest
import torch
from harness.saved_activations import saved_activations
from peft import PeftModel, get_peft_model

import idlora_ext
from idlora_ext import IdLoraConfig, reference
from idlora_ext.tools.inspection import alpha_statistics
from tests.helpers.models import (
    FIELDS,
    MODELS,
    PLAIN,
    inputs,
    layers_of,
    logits,
    randomize_adapter,
    randomize_static,
    tiny_llama,
    training_losses,
)

STATIC = FIELDS | {"router": "static"}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", PLAIN)
def test_layers_follow_the_equation(kind, shared):
    model = idlora_ext.apply(MODELS[kind].make().double(), **MODELS[kind].fields(router="static", shared_router=shared))
    layers = layers_of(model)
    for layer in layers.values():
        router = layer.idlora_adapter["default"].router
        assert torch.equal(router, torch.ones(1 if shared else 2))
        assert router.requires_grad
    for name, layer in layers_of(randomize_static(model)).items():
        index, router, B = layer.idlora_adapter["default"].tensors(torch.float64)
        h = torch.randn(3, 5, layer.in_features, dtype=torch.float64)
        expected = reference.linear(h, layer.get_base_weight(), layer.base_layer.bias, index, router, B)
        torch.testing.assert_close(layer(h), expected, rtol=1e-10, atol=1e-10, msg=name)
        assert torch.equal(layer.alpha(h), router.float().expand(3, 5, 2))


def test_one_constant_keeps_the_sum_and_several_keep_x():
    kept = {}
    for shared in (True, False):
        layer = torch.nn.Sequential(torch.nn.Linear(512, 64, bias=False)).requires_grad_(False)
        h = torch.randn(16, 512, requires_grad=True)
        without = saved_activations(layer, h).values
        fields = {"selection": "sequential", "target_modules": ["0"], "shared_router": shared}
        idlora_ext.apply(layer, **STATIC | fields)
        kept[shared] = (saved_activations(layer, h).values - without) / 16
    assert kept == {True: 8, False: 2 * 8}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("shared", [True, False])
def test_training_moves_the_constants(shared, dropout):
    model = idlora_ext.apply(tiny_llama(), **STATIC, shared_router=shared, dropout=dropout).train()
    losses = training_losses(model)
    assert losses[-1] < losses[0] - 0.1
    for layer in layers_of(model).values():
        assert (layer.idlora_adapter["default"].router != 1).all()


@pytest.mark.parametrize("shared", [True, False])
def test_saved_and_loaded_bit_for_bit(tmp_path, shared):
    model = randomize_static(idlora_ext.apply(tiny_llama(), **STATIC, shared_router=shared))
    expected = logits(model)
    idlora_ext.save(model, tmp_path)
    assert torch.equal(logits(idlora_ext.load(tiny_llama(), tmp_path)), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), expected)
    linear = idlora_ext.apply(tiny_llama(), **FIELDS)
    with pytest.raises(ValueError, match="the file's router is static, that of adapter 'default' in the model linear"):
        idlora_ext.load(linear, tmp_path)


def test_beside_a_linear_router_summed_and_in_a_mixed_batch():
    model = get_peft_model(tiny_llama().double(), IdLoraConfig(**FIELDS, shared_router=False), "linear")
    model.add_adapter("static", IdLoraConfig(**STATIC, seed=1))
    randomize_static(randomize_adapter(model, "linear"), "static").eval()
    ids = inputs(batch=3)["input_ids"]
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=["static", "__base__", "linear"]).logits
        for row, name in ((0, "static"), (2, "linear")):
            model.set_adapter(name)
            torch.testing.assert_close(mixed[row], model(input_ids=ids[row : row + 1]).logits[0], rtol=1e-9, atol=1e-9)
        assert (mixed[0] - model(input_ids=ids[:1]).logits[0]).abs().max() > 1e-3
    model.base_model.set_adapter(["static", "linear"])
    layer = next(iter(layers_of(model).values()))
    h = torch.randn(4, layer.in_features, dtype=torch.float64)
    y0 = layer.base_layer(h)
    update = sum(
        reference.adapt(y0, *layer.idlora_adapter[name].tensors(y0.dtype)) - y0 for name in ("static", "linear")
    )
    torch.testing.assert_close(layer(h), y0 + update, rtol=1e-9, atol=1e-9)


def test_summary_and_inspection():
    model = randomize_static(idlora_ext.apply(tiny_llama(), **STATIC, shared_router=False))
    summary = idlora_ext.summary(model)
    assert summary.router_parameters == 2 * len(summary.rows)
    for name, statistics in alpha_statistics(model, [[1, 2, 3]]).items():
        router = layers_of(model)[name].idlora_adapter["default"].router
        assert statistics["mean"] == pytest.approx(router.tolist(), rel=1e-6)
        assert statistics["std"] == pytest.approx([0, 0], abs=1e-3)


def test_shapes_say_that_a_router_is_static():
    for router in ("static", "linear"):
        model = idlora_ext.apply(tiny_llama(), **FIELDS | {"router": router})
        with idlora_ext.profiling.captured_shapes(model) as shapes:
            logits(model)
        assert {shape["static_router"] for shape in shapes} == {router == "static"}


def test_configuration_takes_no_other_router():
    with pytest.raises(ValueError, match="router must be one of linear, bounded, static, got 'mlp'"):
        IdLoraConfig(router="mlp")
    assert copy.deepcopy(IdLoraConfig(router="static")).to_dict()["router"] == "static"
