"""What PEFT refuses, and what it has for LoRA alone: refused with a sentence, before anything changes, or it works."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from torch import nn

import idlora_ext
from tests.helpers.models import (
    MODELS,
    OF_PEFT,
    adapted,
    add,
    layers_of,
    logits,
    modules_of,
    randomize_adapter,
    state_of,
)
from tests.helpers.problems import each, named

# Names nobody has: what PEFT raises for its LoRA.

WITH_UNKNOWN_NAMES = {
    "set_adapter": lambda model, _: model.set_adapter("nobody"),
    "delete_adapter": lambda model, _: model.delete_adapter("nobody"),
    "set_requires_grad": lambda model, _: model.set_requires_grad("nobody"),
    "save_pretrained": lambda model, path: model.save_pretrained(path, selected_adapters=["nobody"]),
    "get_peft_model_state_dict": lambda model, _: get_peft_model_state_dict(model, adapter_name="nobody"),
    "load_adapter": lambda model, path: model.load_adapter(path / "nowhere", "nobody"),
    "add_adapter": lambda model, _: model.add_adapter("default", model.peft_config["default"]),
}


@each(operation=named(WITH_UNKNOWN_NAMES), kind=named(OF_PEFT))
def test_unknown_names_raise_what_peft_raises(operation, kind, tmp_path):
    row = MODELS[kind]

    def outcome(model: PeftModel) -> tuple[Any, str]:
        try:
            WITH_UNKNOWN_NAMES[operation](model, tmp_path)
        except Exception as error:
            return type(error), str(error)
        return None, ""

    lora = get_peft_model(row.make(), LoraConfig(target_modules=[row.one]))
    model = adapted(row)
    before = logits(model)
    assert outcome(model) == outcome(lora)
    assert torch.equal(logits(model), before)


# Other tuners, and what PEFT has for LoRA alone.


def test_another_tuners_layers_are_refused_and_its_neighbours_adapted(row, tmp_path):
    model = row.make()
    peft.inject_adapter_in_model(LoraConfig(target_modules=[row.one], init_lora_weights=False), model, "lora")
    before, expected = state_of(model), logits(model)
    with pytest.raises(
        ValueError, match=rf"{row.one} .*\(already adapted by (peft\.tuners\.lora\.(layer|bnb)\.Linear|another tuner)"
    ):
        idlora_ext.apply(model, row.config(target_modules=[row.one]))
    with pytest.raises(ValueError, match=r"already has an adapter 'lora', of the method LORA"):
        idlora_ext.apply(model, row.config(target_modules=[row.other]), adapter_name="lora")
    assert state_of(model) == before
    assert torch.equal(logits(model), expected)

    def mine(model: nn.Module) -> nn.Module:
        idlora_ext.apply(model, row.config(target_modules=[row.other]), adapter_name="mine")
        return randomize_adapter(model, "mine")

    both = logits(mine(model))
    assert not torch.equal(both, expected)
    assert not torch.equal(both, logits(mine(row.make())))
    idlora_ext.save(model, tmp_path, "mine")
    idlora_ext.remove(model, "mine")
    assert modules_of(model) == before[0]
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(idlora_ext.load(model, tmp_path, "mine")), both)


def test_all_linear_does_not_pass_over_another_tuners_layers(row):
    model = row.make()
    peft.inject_adapter_in_model(LoraConfig(target_modules=[row.one], init_lora_weights=False), model, "lora")
    before = state_of(model)
    with pytest.raises(
        ValueError, match=rf'"all-linear" takes in layers that another tuner has adapted: .*({row.one}|experts)'
    ):
        idlora_ext.apply(model, row.config(), adapter_name="mine")
    assert state_of(model) == before
    excluded = [row.one, "experts", *(row.config().exclude_modules or [])]
    idlora_ext.apply(model, row.config(exclude_modules=excluded), adapter_name="mine")
    assert layers_of(model)
    assert row.layer not in layers_of(model)


def test_lora_can_come_on_top(row, tmp_path):
    if row.quantised:
        pytest.skip("PEFT's LoRA for quantised layers reads them itself")
    row = row._replace(layer="model.layers.0.self_attn.q_proj", one="q_proj") if row is MODELS["moe"] else row
    model = idlora_ext.apply(row.make(), row.config())
    before = logits(randomize_adapter(model))
    h = torch.randn(3, layers_of(model)[row.layer].in_features)
    ours = model.get_submodule(row.layer)(h)
    peft.inject_adapter_in_model(LoraConfig(target_modules=[row.one], init_lora_weights=False), model, "lora")
    lora = model.get_submodule(row.layer)
    assert isinstance(lora, peft.tuners.lora.LoraLayer)
    update = lora.lora_B["lora"](lora.lora_A["lora"](h)) * lora.scaling["lora"]
    torch.testing.assert_close(lora(h), ours + update)
    idlora_ext.save(model, tmp_path)  # under the layers' own names: it fits the base model
    assert torch.equal(logits(idlora_ext.load(row.make(), tmp_path)), before)
    B = layers_of(model)[row.layer + ".base_layer"].idlora_adapter["default"].B
    stored = B.detach().clone()
    B.data.zero_()
    idlora_ext.load(model, tmp_path)  # and in place
    assert torch.equal(B, stored)


@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
def test_loras_target_parameters_of_open_experts_are_refused(parameter):
    model = idlora_ext.apply(MODELS["moe"].make(), MODELS["moe"].config())
    before, expected = modules_of(model), logits(model)
    config = LoraConfig(target_modules=[], target_parameters=[f"mlp.experts.{parameter}"])
    with pytest.raises(ValueError, match=r'Qwen3MoeExperts: its experts are open.*exclude_modules=\["experts"\]'):
        peft.inject_adapter_in_model(config, model, "lora")
    assert modules_of(model) == before
    assert torch.equal(logits(model), expected)
    model = idlora_ext.apply(MODELS["moe"].make(), MODELS["moe"].config(exclude_modules=["experts"]))
    assert logits(peft.inject_adapter_in_model(config, model, "lora")).isfinite().all()  # the way out


def test_a_peft_model_of_another_tuner_is_refused(row):
    model = get_peft_model(row.make(), LoraConfig(target_modules=[row.one], init_lora_weights=False))
    before, expected = state_of(model), logits(model)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("mine", row.config())
    assert state_of(model) == before
    assert torch.equal(logits(model), expected)


def test_mixed_tuner_types_are_refused(row):
    model = row.make()
    before = state_of(model)
    with pytest.raises(ValueError, match=r"PeftMixedModel does not take ID-LoRA.*model\.base_model\.set_adapter\(\["):
        get_peft_model(model, row.config(), mixed=True)
    assert state_of(model) == before
    if row.quantised:
        return  # PEFT refuses LoRA there too
    mixed = get_peft_model(row.make(), LoraConfig(target_modules=[row.one]), mixed=True)
    expected = modules_of(mixed)
    with pytest.raises(ValueError, match=r"PeftMixedModel does not take ID-LoRA.*model\.base_model\.set_adapter\(\["):
        mixed.add_adapter("mine", row.config())
    assert modules_of(mixed) == expected


def test_weighted_combination_is_refused_with_the_way_out(row):
    model = adapted(row, "red")
    add(model, row, "blue", seed=2)
    before = state_of(model)
    with pytest.raises(TypeError, match=r"no add_weighted_adapter.*set_adapter\(\["):
        model.add_weighted_adapter(["red", "blue"], [0.5, 0.5], "green")
    assert state_of(model) == before


def test_hot_swapping_is_loading_in_place(row, tmp_path):
    other = adapted(row, seed=9, selection="random")  # other rows too
    other.save_pretrained(tmp_path)
    model = adapted(row)
    expected = logits(model)
    with pytest.raises(ValueError, match=r"hotswap_adapter takes LoRA only\. idlora_ext\.load\("):
        hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    assert torch.equal(logits(model), expected)
    tensors = {name: p.data_ptr() for name, p in model.named_parameters()}
    idlora_ext.load(model, tmp_path)
    assert torch.equal(logits(model), logits(other))
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == tensors  # nothing to compile anew

    adapted(row, seed=3, scaling=0.5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the file's scaling is 0\.5, that of adapter 'default' in the model 1\.0"):
        idlora_ext.load(model, tmp_path)
    assert torch.equal(logits(model), logits(other))


def test_scaling_contexts_of_peft_refuse_other_methods(row):
    with (
        pytest.raises(ValueError, match="only supported for models with `LoraLayer`s"),
        rescale_adapter_scale(adapted(row), 0.5),
    ):
        pass
