"""What must not happen: a failure that leaves a trace, an error that does not name its cause."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

import idlora_ext
from idlora_ext import IdLoraConfig
from tests.helpers.models import FIELDS, logits, randomize_adapter, state_of, tiny_llama


def test_applying_a_name_twice_is_an_error_and_changes_nothing():
    model = randomize_adapter(idlora_ext.apply(tiny_llama(), **FIELDS))
    before, output = state_of(model), logits(model)
    with pytest.raises(ValueError, match=r"already has an ID-LoRA adapter 'default'.*another adapter_name"):
        idlora_ext.apply(model, **FIELDS)
    assert state_of(model) == before
    assert torch.equal(logits(model), output)
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter(IdLoraConfig(**FIELDS))
    assert torch.equal(logits(model), output)


class Odd(nn.Module):
    """A model with everything that cannot be adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Linear(16, 16)
        self.conv = nn.Conv2d(1, 1, 1)
        self.embed = nn.Embedding(4, 16)
        self.attention = nn.MultiheadAttention(16, 2)
        self.odd = nn.Linear(16, 15)
        self.tiny = nn.Linear(16, 2)


BAD = {
    "convolution": (Odd, {"target_modules": ["fine", "conv"]}, r"conv \(Conv2d\)"),
    "embedding": (Odd, {"target_modules": ["fine", "embed"]}, r"embed \(Embedding\)"),
    "several": (Odd, {"target_modules": ["conv", "embed", "fine"]}, r"conv \(Conv2d\), embed \(Embedding\)"),
    "attention": (Odd, {"target_modules": ["out_proj", "fine"]}, r"attention.out_proj \(nn.MultiheadAttention reads"),
    "odd": (Odd, {"target_modules": ["fine", "odd"]}, r"odd \(d = 15 cannot hold k = 2 clusters of a rank"),
    "tiny": (Odd, {"target_modules": ["fine", "tiny"]}, r"tiny \(d = 2 cannot hold.*exclude_modules"),
    "none": (Odd, {"target_modules": ["nothing"]}, "not found in the base model"),
    "too narrow": (Odd, {"target_modules": ["fine"], "r": 32, "rank_fit": "error"}, r"fine \(d = 16: r = 8 instead of 32\).*Lower r"),
    "nan": (lambda: poisoned(float("nan")), {}, r"layer 'model.layers.1.mlp.up_proj': .*finite.*exclude_modules"),
    "inf": (lambda: poisoned(float("inf")), {}, r"layer 'model.layers.1.mlp.up_proj': .*finite"),
    "other tuner": (lambda: inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), tiny_llama(), "lora"), {"target_modules": ["q_proj", "v_proj"]}, "already adapted by peft.tuners.lora.*"),
}  # fmt: skip


def poisoned(value):
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    return model


@pytest.mark.parametrize("case", BAD)
def test_a_failure_names_the_layers_and_leaves_the_model_as_it_was(case):
    make, fields, message = BAD[case]
    model = make().train()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        idlora_ext.apply(model, **(FIELDS | fields))
    assert state_of(model) == before
    config = IdLoraConfig(**(FIELDS | fields))
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config)
    assert state_of(model) == before


def test_a_failing_second_adapter_leaves_the_first_one_as_it_was():
    model = randomize_adapter(idlora_ext.apply(tiny_llama(), target_modules=["q_proj"], **FIELDS))
    before, output = state_of(model), logits(model)
    model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = float("nan")
    poisoned_output = logits(model)
    for _ in range(2):
        with pytest.raises(ValueError, match="k_proj"):
            idlora_ext.apply(model, adapter_name="b", **FIELDS)
        assert state_of(model) == before
        assert model.active_adapters() == ["default"]
        torch.testing.assert_close(logits(model), poisoned_output, equal_nan=True)
    assert not torch.equal(output, poisoned_output)

    peft_model = get_peft_model(tiny_llama(), IdLoraConfig(target_modules=["q_proj"], **FIELDS))
    before = state_of(peft_model.get_base_model())
    with pytest.raises(ValueError, match="nothing"):
        peft_model.add_adapter("b", IdLoraConfig(target_modules=["nothing"], **FIELDS))
    assert state_of(peft_model.get_base_model()) == before
    assert list(peft_model.peft_config) == ["default"]


def test_interrupting_the_clustering_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_llama()
    before = state_of(model)
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    from idlora_ext.layer import adapter as adapter_module

    original = adapter_module.select_rows
    monkeypatch.setattr(adapter_module, "select_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        idlora_ext.apply(model, **FIELDS)
    assert state_of(model) == before


def test_wrong_arguments_of_apply():
    model = tiny_llama()
    for arguments, error, message in (
        ({"rank": 4}, TypeError, "IdLoraConfig has no field rank; it has .*rank_boost"),
        ({"adapter_name": "a.b"}, ValueError, "adapter_name must be"),
        ({"config": LoraConfig()}, TypeError, "config must be an IdLoraConfig, got LoraConfig"),
    ):
        with pytest.raises(error, match=message):
            idlora_ext.apply(model, **arguments)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        idlora_ext.apply("model")
    with pytest.raises(TypeError, match=r"use model.add_adapter"):
        idlora_ext.apply(get_peft_model(tiny_llama(), IdLoraConfig(**FIELDS)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r must be an integer >= 1, got 0"),
        ({"r": 7}, "r must be a multiple of rank_boost = 2, got 7"),
        ({"num_clusters": 1.5}, "num_clusters must be an integer"),
        (
            {"selection": "best"},
            "selection must be one of pivoted_qr_whole, pivoted_qr, nearest, sequential, random, got 'best'",
        ),
        ({"router": "square"}, "router must be one of linear"),
        ({"dropout": 1.0}, r"dropout must be a number in \[0, 1\)"),
        ({"rank_fit": "maybe"}, "rank_fit must be one of shrink, error"),
        ({"rank_pattern": {"q_proj": 5}}, r"rank_pattern must be ranks .*got \{'q_proj': 5\}"),
        ({"clusters_pattern": {"q_proj": 0}}, r"clusters_pattern must be integers >= 1, got \{'q_proj': 0\}"),
        ({"seed": -1}, "seed must be an integer >= 0"),
        ({"target_modules": None}, "target_modules must be"),
        ({"layers_pattern": "h"}, "means nothing without layers_to_transform"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        IdLoraConfig(**fields)
