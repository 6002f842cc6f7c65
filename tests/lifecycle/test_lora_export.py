"""A static router exported as a plain LoRA: read back by PEFT in processes where this package cannot be imported."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import idlora_ext
from idlora_ext import IdLoraConfig
from idlora_ext.cli import main
from tests.helpers.commands import read_in_plain_peft
from tests.helpers.models import (
    FIELDS,
    MODELS,
    adapted_static,
    inputs,
    layers_of,
    logits,
    randomize_static,
    tiny_llama,
    tiny_qwen2,
)

STATIC = FIELDS | {"router": "static"}


@pytest.mark.subprocess
def test_plain_peft_reproduces_the_model(tmp_path):
    """Ranks that differ, biases, Conv1D, a head trained in full, several adapters of which one is merged."""
    models = {
        "llama": adapted_static(
            "llama", shared_router=False, scaling=0.7, rank_pattern={"k_proj": 4, "layers.1.self_attn.q_proj": 2}
        ),
        "gpt2": adapted_static("gpt2", shared_router=False),
        "qwen2": randomize_static(
            idlora_ext.apply(tiny_qwen2().double(), **STATIC, target_modules=r"model\.layers\.1\..*_proj")
        ),
        "bert": adapted_static("bert", modules_to_save=["classifier"], task_type="SEQ_CLS"),
    }
    nn.init.normal_(models["bert"].classifier.modules_to_save["default"].weight)
    models["llama"].add_adapter("second", IdLoraConfig(**STATIC, seed=3))
    expected, jobs = {}, []
    for kind, model in models.items():
        base, lora = tmp_path / f"{kind}-base", str(tmp_path / kind)
        plain = MODELS[kind].make().double()
        plain.save_pretrained(base)
        torch.save(inputs()["input_ids"], base / "ids.pt")
        expected[lora] = logits(model)
        assert (expected[lora] - logits(plain)).abs().max() > 1e-3
        if kind == "llama":
            model.merge_adapter()
        idlora_ext.to_lora(model, lora)
        jobs.append(f"{type(plain).__name__}={base}={lora}")
    found = read_in_plain_peft(str(tmp_path / "logits.safetensors"), jobs)
    assert found.keys() == expected.keys()
    for lora, values in expected.items():
        torch.testing.assert_close(found[lora], values, rtol=1e-9, atol=1e-9)

    config = json.loads((tmp_path / "llama" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 8, 8)
    assert not config["rank_pattern"]  # readers that know one rank scale all layers by it
    assert not config["alpha_pattern"]
    assert set(config["target_modules"]) == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert json.loads((tmp_path / "gpt2" / "adapter_config.json").read_text())["fan_in_fan_out"]


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_the_tensors_are_the_equation(dtype, tmp_path):
    """In the base model's dtype, or another; one rank for all, filled up with zeros."""
    model = adapted_static(r=12, shared_router=False, scaling=0.7, dtype=torch.bfloat16, rank_pattern={"k_proj": 4})
    idlora_ext.to_lora(model, tmp_path, dtype=dtype, pad=dtype is None)
    r = 12 if dtype else 16
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (r, r, {})
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * 14
    rounding = {"rtol": 1e-6, "atol": 1e-6} if dtype else {"rtol": 2**-8, "atol": 1e-6}
    for name, layer in layers_of(model).items():
        A, B = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        assert A.dtype == B.dtype == (dtype or torch.bfloat16)
        a, small = layer.idlora_adapter["default"].router, layer.idlora_adapter["default"].B
        index = layer.idlora_adapter["default"].index.long()
        W = layer.base_layer.weight.double()
        own = index.shape[1]
        assert own == (4 if "k_proj" in name else 12)
        assert (len(A), B.shape[1]) == (r, r)
        assert not A[own:].any()
        assert not B[:, own:].any()
        torch.testing.assert_close(A[:own].double(), sum(a[i] * W[index[i]] for i in range(2)), **rounding)
        torch.testing.assert_close(B[:, :own].float(), 0.7 * torch.block_diag(small, small), **rounding)


def test_names_that_end_alike_are_told_apart(tmp_path):
    """PEFT's lists and patterns also match every longer name that ends with one of theirs."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.q = nn.Linear(16, 32)
            self.inner = nn.ModuleDict({"q": nn.Linear(32, 32), "p": nn.ModuleDict({"q": nn.Linear(32, 32)})})

        def forward(self, h):
            return self.inner["p"]["q"](self.inner["q"](self.q(h)))

    h = torch.randn(3, 16)
    fields = {"r": 8, "num_clusters": 2, "router": "static", "rank_pattern": {"^inner.q": 4}}
    model = randomize_static(get_peft_model(Model(), IdLoraConfig(**fields, target_modules=r"q|inner\.q")))
    idlora_ext.to_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(Model(), tmp_path)
    assert {name.rpartition(".lora_A")[0] for name, _ in lora.named_parameters() if "lora_A" in name} == {
        "base_model.model.q",
        "base_model.model.inner.q",
    }
    torch.testing.assert_close(lora(h), model(h))


@pytest.mark.parametrize("broken", ["linear router", "no adapter", "pending", "experts"])
def test_refused_before_anything_is_written(tmp_path, broken):
    model, name = adapted_static(), "default"
    if broken == "linear router":
        model.add_adapter(name := "linear", IdLoraConfig(**FIELDS))
        match = r"layer 'model.*', adapter 'linear': .*depend on the token.*router=\"static\""
    elif broken == "no adapter":
        name, match = "x", "the model has no ID-LoRA adapter 'x'"
    elif broken == "pending":
        next(iter(layers_of(model).values())).idlora_adapter["default"].pending = True
        match = "has no rows yet"
    else:
        from transformers import MixtralConfig, MixtralForCausalLM

        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 101}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
        model = idlora_ext.apply(MixtralForCausalLM(MixtralConfig(**sizes | heads)), **STATIC)
        match = "expert of fused parameters.*merge_and_unload"
    with pytest.raises(ValueError, match=match):
        idlora_ext.to_lora(model, tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path, capsys):
    base, adapter, output = (str(tmp_path / name) for name in ("base", "adapter", "lora"))
    tiny_llama().save_pretrained(base)
    model = randomize_static(idlora_ext.apply(tiny_llama(), **STATIC))
    idlora_ext.save(model, adapter)
    command = ["export", adapter, "--base", base, "--to", "lora", "--pad", "--output", output]
    assert main(command) == 0
    assert capsys.readouterr().out == f"written to {output}\n"
    torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny_llama(), output)), logits(model))
    assert main(command) == 2
    assert "is not empty" in capsys.readouterr().err
    idlora_ext.save(idlora_ext.apply(tiny_llama(), **FIELDS), adapter + "-linear")
    command[1:2], command[-1] = [adapter + "-linear"], output + "2"
    assert main(command) == 2
    assert 'router="static"' in capsys.readouterr().err
