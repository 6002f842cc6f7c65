"""What PEFT does with any of its tuners, done with ours: rows of models x behaviours, as in PEFT's own tests."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from idlora_ext import IdLoraConfig
from tests.helpers.models import (
    FIELDS,
    MODELS,
    adapted,
    add,
    layers_of,
    logits,
    modules_of,
    randomize_adapter,
    state_of,
)


def names_of(model: nn.Module, adapter_name: str) -> list[str]:
    return [name for name in model.state_dict() if adapter_name in name.split(".")]


# Several adapters.


def test_adapters_are_added_switched_summed_and_deleted(row):
    base = logits(row.make())
    model = adapted(row, "red")
    only_a = logits(model)
    add(model, row, "blue", seed=2, shared_router=False)
    assert torch.equal(logits(model), only_a)  # PEFT: an added adapter is not active
    model.set_adapter("blue")
    only_b = logits(model)
    assert not torch.equal(only_a, only_b)

    model.base_model.set_adapter(["red", "blue"])
    assert model.active_adapters == ["red", "blue"]
    layer = layers_of(model)[row.layer]
    h = torch.randn(3, layer.in_features)
    both, updates = layer(h), []
    for name in ("red", "blue"):
        layer.set_adapter(name)
        updates.append(layer(h) - layer.base_layer(h))
    torch.testing.assert_close(both, layer.base_layer(h) + updates[0] + updates[1])

    model.set_adapter("blue")
    with pytest.warns(UserWarning, match="Adapter blue was active which is now deleted. Setting active adapter to red"):
        model.delete_adapter("blue")
    assert model.active_adapters == ["red"]
    assert list(model.peft_config) == ["red"]
    assert not names_of(model, "blue")
    assert torch.equal(logits(model), only_a)
    add(model, row, "blue", seed=2, shared_router=False)  # the name is free again
    model.set_adapter("blue")
    assert torch.equal(logits(model), only_b)
    model.delete_adapter("red")
    inside = model.get_base_model()
    model.delete_adapter("blue")  # PEFT's own object has nothing to ask any more, its LoRA's neither
    assert torch.equal(logits(inside), base)


def test_selected_adapters_are_saved_each_in_its_directory(row, tmp_path):
    model = adapted(row, "red")
    add(model, row, "blue", seed=2)
    add(model, row, "green", seed=3)
    model.set_adapter("green")
    expected = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["red", "green"])
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["green", "red"]
    assert torch.equal(logits(PeftModel.from_pretrained(row.make(), tmp_path / "green").eval()), expected)


def test_disabling_several_adapters_and_saved_modules_is_bit_equal_to_the_base(row):
    base = logits(row.make())
    model = adapted(row, "red", modules_to_save=[row.head])
    add(model, row, "blue", seed=2)
    for name, parameter in model.named_parameters():
        if "modules_to_save.red" in name:
            parameter.data += 1
    model.base_model.set_adapter(["red", "blue"])
    active = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), active)
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model), base)
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model), active)


def test_each_adapter_has_its_own_copy_of_a_module_to_save(row, tmp_path):
    model = adapted(row, "red", modules_to_save=[row.head])
    add(model, row, "blue", seed=2, modules_to_save=[row.head])
    outputs = {}
    for number, name in enumerate(("red", "blue"), start=1):
        for path, parameter in model.named_parameters():
            if f"modules_to_save.{name}" in path:
                parameter.data *= 1 + number
        model.set_adapter(name)
        trainable = {path for path, parameter in model.named_parameters() if parameter.requires_grad}
        assert any(f"modules_to_save.{name}" in path for path in trainable)
        assert all(f".{name}" in path for path in trainable)
        outputs[name] = logits(model)
    model.save_pretrained(tmp_path)
    for name in ("red", "blue"):
        assert torch.equal(logits(PeftModel.from_pretrained(row.make(), tmp_path / name).eval()), outputs[name])


# Gradients and status.


def test_set_requires_grad(row):
    model = adapted(row, "red")
    add(model, row, "blue", seed=2)

    def trainable() -> set[str]:
        return {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}

    assert trainable() == {"red"}
    model.set_requires_grad("red", requires_grad=False)
    assert trainable() == set()
    model.set_requires_grad(["red", "blue"])
    assert trainable() == {"red", "blue"}
    model.set_requires_grad("nobody")
    assert trainable() == {"red", "blue"}
    model.set_adapter("blue", inference_mode=True)
    assert trainable() == set()


def test_layer_and_model_status(row):
    model = adapted(row, "red")
    add(model, row, "blue", seed=2, target_modules=[row.one])
    layers = {status.name: status for status in model.get_layer_status()}
    assert set(layers) == {f"model.{name}" for name in layers_of(model)}
    status = layers[f"model.{row.layer}"]
    assert status.module_type == "idlora.Linear"
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["red"], [])
    assert status.available_adapters == ["blue", "red"]
    assert status.requires_grad == {"red": True, "blue": False}
    assert status.devices == {"red": ["cpu"], "blue": ["cpu"]}

    whole = model.get_model_status()
    assert (whole.adapter_model_type, whole.peft_types) == ("IdLoraModel", {"red": "IDLORA", "blue": "IDLORA"})
    assert whole.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert whole.total_params == sum(p.numel() for p in model.parameters())
    assert (whole.num_adapter_layers, whole.enabled, whole.active_adapters) == (len(layers), True, ["red"])
    assert (whole.merged_adapters, whole.available_adapters) == ([], ["blue", "red"])
    model.base_model.disable_adapter_layers()
    assert model.get_model_status().enabled is False


# Taking apart and copying.


def test_unload_leaves_the_base_model(row):
    base = row.make()
    before, expected = modules_of(base), logits(base)
    model = adapted(row)
    plain = adapted(row).unload()
    assert not layers_of(plain)
    assert modules_of(plain).keys() == before.keys()
    assert torch.equal(logits(plain), expected)
    assert not torch.equal(logits(model), expected)
    assert not torch.equal(logits(randomize_adapter(get_peft_model(plain, row.config()))), expected)


def test_deepcopy_is_independent(row):
    model = adapted(row)
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    randomize_adapter(twin, seed=5)
    assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(twin), expected)


def test_configurations_pickle_copy_and_go_through_dictionaries():
    config = IdLoraConfig(**FIELDS, rank_pattern={"q_proj": 4}, target_modules=["q_proj"], modules_to_save=["head"])
    for twin in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), copy.copy(config)):
        assert twin == config
        assert type(twin) is IdLoraConfig
        assert twin.peft_type is peft.PeftType.IDLORA
    assert IdLoraConfig(**{k: v for k, v in config.to_dict().items() if k != "peft_type"}).to_dict() == config.to_dict()


def test_models_pickle(row, tmp_path):
    model = adapted(row)
    torch.save(model, tmp_path / "whole.pt")
    assert torch.equal(logits(torch.load(tmp_path / "whole.pt", weights_only=False)), logits(model))


# Targets.


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_layers_to_transform_and_exclude_modules(kind):
    row = MODELS[kind]
    every = set(layers_of(adapted(row)))
    second = {name for name in every if ".1." in name}
    assert 0 < len(second) < len(every)
    assert set(layers_of(adapted(row, layers_to_transform=[1]))) == second
    excluded = [row.one, row.head]
    assert set(layers_of(adapted(row, exclude_modules=excluded))) == {n for n in every if not n.endswith(row.one)}
    pattern = rf".*{row.one}|.*{row.head}"
    assert set(layers_of(adapted(row, exclude_modules=pattern))) == {n for n in every if not n.endswith(row.one)}


# Saving, loading, state dictionaries.


@pytest.mark.parametrize("is_trainable", [True, False])
def test_from_pretrained_is_trainable_or_frozen(row, is_trainable, tmp_path):
    model = adapted(row, modules_to_save=[row.head])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(row.make(), tmp_path, is_trainable=is_trainable)
    assert torch.equal(logits(loaded.eval()), logits(model))
    assert loaded.peft_config["default"].inference_mode is not is_trainable
    trainable = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trainable == ({name for name, p in model.named_parameters() if p.requires_grad} if is_trainable else set())


def test_low_cpu_mem_usage(row, tmp_path):
    model = adapted(row)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(row.make(), tmp_path, low_cpu_mem_usage=True).eval()), expected)

    state = get_peft_model_state_dict(model)
    empty = get_peft_model(row.make(), row.config(), low_cpu_mem_usage=True).eval()
    assert {p.device.type for name, p in empty.named_parameters() if "idlora_" in name} == {"meta"}
    set_peft_model_state_dict(empty, state, low_cpu_mem_usage=True)
    assert torch.equal(logits(empty), expected)

    injected = peft.inject_adapter_in_model(row.config(), row.make(), low_cpu_mem_usage=True)
    state = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}
    set_peft_model_state_dict(injected, state, low_cpu_mem_usage=True)
    assert torch.equal(logits(injected.eval()), expected)

    model.load_adapter(tmp_path, "again", low_cpu_mem_usage=True)
    model.set_adapter("again")
    assert torch.equal(logits(model.eval()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_adapter_dtype(row, dtype, tmp_path):
    if row.quantised:
        pytest.skip("bitsandbytes casts no model")

    def dtypes(model: nn.Module, adapter_name: str = "default") -> set[torch.dtype]:
        return {p.dtype for name, p in model.named_parameters() if f".{adapter_name}." in name}

    assert dtypes(get_peft_model(row.make().to(dtype), row.config())) == {torch.float32}
    model = get_peft_model(row.make().to(dtype), row.config(), autocast_adapter_dtype=False)
    assert dtypes(model) == {dtype}
    model.add_adapter("blue", row.config(), autocast_adapter_dtype=False)
    assert dtypes(model, "blue") == {dtype}
    peft.functional.cast_adapter_dtype(model, "blue", autocast_adapter_dtype=True)
    assert (dtypes(model), dtypes(model, "blue")) == ({dtype}, {torch.float32})


def test_state_dictionaries(row):
    model = adapted(row, "red", modules_to_save=[row.head])
    add(model, row, "blue", seed=2)
    expected = logits(model)
    state = get_peft_model_state_dict(model, adapter_name="red")
    assert not any("red" in name or "blue" in name for name in state)
    layer = f"base_model.model.{row.layer}"
    assert {f"{layer}.{part}" for part in ("idlora_adapter.index", "idlora_adapter.router", "idlora_adapter.B")} <= set(
        state
    )
    assert any(f".{row.head}." in name for name in state)
    from_state = get_peft_model_state_dict(model, state_dict=model.state_dict(), adapter_name="red")
    assert from_state.keys() == state.keys()

    fresh = get_peft_model(row.make(), row.config(modules_to_save=[row.head]), adapter_name="mine").eval()
    assert not torch.equal(logits(fresh), expected)
    result = set_peft_model_state_dict(fresh, state, adapter_name="mine")
    assert not result.unexpected_keys
    assert torch.equal(logits(fresh), expected)


def test_peft_functional(row):
    model = row.make()
    base = logits(model)
    peft.functional.inject_adapter_in_model(row.config(), model, adapter_name="red")
    peft.functional.inject_adapter_in_model(row.config(seed=1), model, adapter_name="blue")
    for name in ("red", "blue"):
        randomize_adapter(model, name, seed=len(name))
    peft.functional.set_adapter(model, "red")
    only_a = logits(model)
    state = peft.functional.get_peft_model_state_dict(model, adapter_name="red")
    peft.functional.set_requires_grad(model, "red", requires_grad=False)
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith(".red"))
    peft.functional.set_adapter(model, "blue")
    assert not torch.equal(logits(model), only_a)
    peft.functional.set_peft_model_state_dict(model, state, adapter_name="blue")
    assert torch.equal(logits(model), only_a)
    peft.functional.delete_adapter(model, "blue", prefix="idlora_")
    assert not names_of(model, "blue")
    assert torch.equal(logits(model), only_a)
    peft.functional.delete_adapter(model, "red", prefix="idlora_")
    assert torch.equal(logits(model), base)


AUTO = {
    "llama": (peft.AutoPeftModelForCausalLM, "CAUSAL_LM"),
    "gpt2": (peft.AutoPeftModelForCausalLM, "CAUSAL_LM"),
    "bert": (peft.AutoPeftModelForSequenceClassification, "SEQ_CLS"),
}


@pytest.mark.parametrize("kind", AUTO)
def test_auto_peft_classes(kind, tmp_path):
    auto, task = AUTO[kind]
    row = MODELS[kind]
    row.make().save_pretrained(tmp_path / "base")
    labels = {"num_labels": 3} if kind == "bert" else {}
    base = auto._target_class.from_pretrained(tmp_path / "base", **labels)
    for again, task_type in ((auto, task), (peft.AutoPeftModel, None)):  # as PEFT has it: without a task
        model = randomize_adapter(get_peft_model(copy.deepcopy(base), row.config(task_type=task_type)).eval())
        model.save_pretrained(tmp_path / str(task_type))
        loaded = again.from_pretrained(tmp_path / str(task_type), **labels)
        assert type(loaded) is type(model)
        assert torch.equal(logits(loaded.eval()), logits(model))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_resized_embeddings(kind, tmp_path):
    row = MODELS[kind]

    def resized() -> nn.Module:
        model = row.make()
        torch.manual_seed(7)
        model.resize_token_embeddings(105, mean_resizing=False)
        return model

    model = randomize_adapter(get_peft_model(resized(), row.config()).eval())
    model.get_base_model().get_input_embeddings().weight.data += 0.5  # only the file can bring it back
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert torch.equal(logits(PeftModel.from_pretrained(resized(), tmp_path).eval()), logits(model))

    small = row.make()
    before, expected = state_of(small), logits(small)
    with pytest.raises(ValueError, match=r"the file has shape \[105, 64\], the model \[101, 64\]"):
        PeftModel.from_pretrained(small, tmp_path)
    assert state_of(small) == before
    assert torch.equal(logits(small), expected)


# Scales.


def test_scales(row):
    model = adapted(row, "red", scaling=0.5)
    add(model, row, "blue", seed=2, target_modules=[row.one], scaling=2.0)
    model.base_model.set_adapter(["red", "blue"])
    expected, layers = logits(model), layers_of(model).values()

    def scalings(name: str) -> set[float]:
        return {layer.idlora_adapter[name].scaling for layer in layers if name in layer.idlora_adapter}

    def each(method: str, *arguments: Any) -> tuple[set[float], set[float]]:
        for layer in layers:
            getattr(layer, method)(*arguments)
        return scalings("red"), scalings("blue")

    assert each("scale_layer", 3) == ({1.5}, {6.0})
    assert not torch.equal(logits(model), expected)
    assert each("unscale_layer", 6) == ({0.25}, {1.0})
    assert each("unscale_layer") == ({0.5}, {2.0})
    assert torch.equal(logits(model), expected)
    assert each("set_scale", "red", 0) == ({0.0}, {2.0})
    assert each("set_scale", "red", 4) == ({2.0}, {2.0})  # a factor on the configured scale
    assert each("set_scale", "nobody", 4) == ({2.0}, {2.0})
    model.set_adapter("blue")
    assert each("scale_layer", 2) == ({2.0}, {4.0})  # the active adapters only
    model.delete_adapter("blue")
    assert scalings("blue") == set()
    assert each("unscale_layer") == ({0.5}, set())
