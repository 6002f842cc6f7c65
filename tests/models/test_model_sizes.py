"""Parameter counts on real model configurations, on the meta device: the table of the method, to the last digit."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import idlora_ext


@dataclass(frozen=True)
class Size:
    """A model's configuration and what both methods train of it, all linear layers but the head."""

    config: dict[str, int | bool]
    frozen: int
    B: int  # ID-LoRA r = 128, k = 4, s = 2
    B_percent: str  # of all parameters, as PEFT prints it
    lora: int  # r = 32
    lora_percent: str


SIZES = {
    "Llama-3.2-3B": Size(
        {
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 128256,
            "tie_word_embeddings": True,
        },
        frozen=3_212_749_824,
        B=24_772_608,
        B_percent="0.77",
        lora=48_627_712,
        lora_percent="1.49",
    ),
    "Llama-3-8B": Size(
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 128256,
            "tie_word_embeddings": False,
        },
        frozen=8_030_261_248,
        B=44_040_192,
        B_percent="0.55",
        lora=83_886_080,
        lora_percent="1.03",
    ),
}


@pytest.fixture(params=SIZES)
def size(request):
    return SIZES[request.param]


@pytest.fixture
def model(size):
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**size.config)).to(torch.bfloat16)


def counts(model):
    """Trainable and all parameters, counted here and not by the libraries."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def percent(trainable, total):
    return f"{100 * trainable / total:.2f}"


@pytest.mark.parametrize(
    ("fields", "router_of_a_layer"),
    [
        ({}, 1),
        ({"shared_router": False}, 4),
        ({"preset": "paper"}, 128),
        ({"router": "linear", "shared_router": False}, 4 * 128),
    ],
    ids=["default", "per-cluster", "paper", "linear-per-cluster"],
)
def test_idlora(size, model, fields, router_of_a_layer):
    assert counts(model) == (size.frozen, size.frozen)
    adapted = idlora_ext.apply(model, **fields)
    layers = 7 * size.config["num_hidden_layers"]
    router = layers * router_of_a_layer
    assert counts(adapted) == (size.B + router, size.frozen + size.B + router)
    B = sum(p.numel() for name, p in adapted.named_parameters() if name.endswith(".B"))
    assert B == size.B
    assert percent(B, size.frozen + B) == size.B_percent

    summary = idlora_ext.summary(adapted)
    assert len(summary.rows) == layers
    assert {(row.k, row.r, row.s, row.shrunk) for row in summary.rows} == {(4, 128, 2, False)}
    assert (summary.B_parameters, summary.router_parameters) == (size.B, router)
    assert (summary.trainable_parameters, summary.total_parameters) == counts(adapted)
    assert summary.percent == pytest.approx(100 * (size.B + router) / (size.frozen + size.B + router), rel=1e-12)
    assert f"{size.B:,}" in str(summary)


def test_lora_beside_it(size, model):
    """The same model after ID-LoRA was taken off it: nothing of the adapter is left in the counts."""
    idlora_ext.remove(idlora_ext.apply(model))
    adapted = get_peft_model(model, LoraConfig(r=32, target_modules="all-linear"))
    assert adapted.get_nb_trainable_parameters() == (size.lora, size.frozen + size.lora)
    assert counts(adapted) == (size.lora, size.frozen + size.lora)
    assert percent(*counts(adapted)) == size.lora_percent


def test_percent_is_the_one_peft_prints(size, model, capsys):
    adapted = get_peft_model(model, idlora_ext.IdLoraConfig())
    adapted.print_trainable_parameters()
    summary = idlora_ext.summary(adapted)
    printed = f"trainable params: {summary.trainable_parameters:,d} || all params: {summary.total_parameters:,d} || "
    assert capsys.readouterr().out == f"{printed}trainable%: {summary.percent:.4f}\n"
    assert f"{summary.percent:.2f}" == size.B_percent  # the router is too small to show
