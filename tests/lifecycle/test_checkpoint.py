"""Adapter files: every door writes and reads the same ones, and nothing unfit gets into a model."""

from __future__ import annotations

import json
import os
import warnings

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import idlora_ext
from idlora_ext import IdLoraConfig
from idlora_ext.rows.fingerprint import difference, fingerprint
from tests.helpers.models import (
    FIELDS,
    MODELS,
    PLAIN,
    inputs,
    logits,
    randomize_adapter,
    state_of,
    tiny_bert,
    tiny_llama,
)
from tests.helpers.problems import every_pair, named

WEIGHTS = "adapter_model.safetensors"
LAYER = "base_model.model.model.layers.0.self_attn.q_proj."


def trained(kind="llama", **fields):
    return randomize_adapter(idlora_ext.apply(MODELS[kind].make(), **MODELS[kind].fields(**fields)))


LOADERS = {
    "load_adapter": lambda model, directory: model.load_adapter(directory) and model,
    "PeftModel": PeftModel.from_pretrained,
    "PeftModel-meta": lambda model, directory: PeftModel.from_pretrained(model, directory, low_cpu_mem_usage=True),
    "load": idlora_ext.load,
}
SAVERS = {
    "save_pretrained": lambda model, directory: model.save_pretrained(directory),
    "save": idlora_ext.save,
}


@pytest.fixture
def no_clustering(monkeypatch):
    """Loading must never choose rows again."""

    def refuse(*args, **kwargs):
        raise AssertionError("rows were chosen while loading")

    monkeypatch.setattr(idlora_ext.layer.adapter, "select_rows", refuse)


@every_pair(kind=named(PLAIN), saver=named(SAVERS), loader=named(LOADERS))
def test_save_and_load_by_every_door(kind, saver, loader, tmp_path, monkeypatch):
    model = trained(kind)
    expected = logits(model)
    SAVERS[saver](model, tmp_path)
    assert (
        {"adapter_config.json", WEIGHTS}
        <= set(os.listdir(tmp_path))
        <= {"adapter_config.json", WEIGHTS, "generation_config.json", "README.md"}
    )
    tensors = load_file(tmp_path / WEIGHTS)
    assert all(key.startswith("base_model.model.") for key in tensors)
    monkeypatch.setattr(idlora_ext.layer.adapter, "select_rows", None)  # loading never clusters
    loaded = LOADERS[loader](MODELS[kind].make(), tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert not any(p.requires_grad for n, p in loaded.named_parameters() if "idlora" in n)


def test_peft_models_files_load_by_every_door(tmp_path, no_clustering, monkeypatch):
    monkeypatch.undo()
    model = randomize_adapter(get_peft_model(tiny_llama(), IdLoraConfig(**FIELDS)))
    model.save_pretrained(tmp_path)
    expected = logits(model)
    for load in LOADERS.values():
        assert torch.equal(logits(load(tiny_llama(), tmp_path)), expected)


def test_auto_classes_and_from_pretrained_on_an_adapter_folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = randomize_adapter(idlora_ext.apply(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), **FIELDS))
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model.eval())
    for auto in (AutoModelForCausalLM, AutoPeftModelForCausalLM):
        assert torch.equal(logits(auto.from_pretrained(tmp_path / "adapter")), expected)


def test_trainable_load_goes_on_training(tmp_path):
    trained().save_pretrained(tmp_path)
    trainable = sum(p.numel() for p in trained().parameters() if p.requires_grad)
    by_load = idlora_ext.load(tiny_llama(), tmp_path, is_trainable=True)
    by_peft = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    for model in (by_load, by_peft):
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable


def test_saving_again_after_loading_writes_the_same_file(tmp_path):
    trained().save_pretrained(tmp_path / "a")
    for i, load in enumerate(LOADERS.values()):
        model = load(tiny_llama(), tmp_path / "a")
        model.save_pretrained(tmp_path / str(i))
        first, again = load_file(tmp_path / "a" / WEIGHTS), load_file(tmp_path / str(i) / WEIGHTS)
        assert first.keys() == again.keys()
        assert all(torch.equal(first[key], again[key]) for key in first)


def test_several_adapters_are_saved_and_loaded_by_name(tmp_path):
    model = trained()
    idlora_ext.apply(model, adapter_name="b", target_modules=["up_proj"], r=16, num_clusters=2)
    randomize_adapter(model, "b", seed=5)
    outputs = {}
    for name in ("default", "b"):
        model.set_adapter(name)
        outputs[name] = logits(model)
        idlora_ext.save(model, tmp_path / name, name)
    fresh = tiny_llama()
    for name in outputs:
        idlora_ext.load(fresh, tmp_path / name, name)
    for name, expected in outputs.items():
        fresh.set_adapter(name)
        assert torch.equal(logits(fresh), expected)
    other = idlora_ext.load(tiny_llama(), tmp_path / "b", "renamed")
    assert torch.equal(logits(other), outputs["b"])


def test_modules_to_save_travel_with_the_adapter(tmp_path):
    model = randomize_adapter(idlora_ext.apply(tiny_bert(), **FIELDS))
    nn.init.normal_(model.classifier.modules_to_save["default"].weight)
    expected = logits(model)
    idlora_ext.save(model, tmp_path / "save")
    model.save_pretrained(tmp_path / "pretrained")
    for name in ("save", "pretrained"):
        for load in LOADERS.values():
            assert torch.equal(logits(load(tiny_bert(), tmp_path / name)), expected)


def test_plain_modules_save_and_load(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 20))

    model = randomize_adapter(idlora_ext.apply(build(), **FIELDS))
    idlora_ext.save(model, tmp_path)
    h = torch.randn(3, 20)
    assert torch.equal(idlora_ext.load(build(), tmp_path)(h), model(h))


@pytest.mark.parametrize("loader", LOADERS)
def test_float32_adapters_of_bfloat16_models_keep_every_digit(loader, tmp_path):
    model = idlora_ext.apply(tiny_llama().bfloat16(), **FIELDS | {"row_scale": True, "center": True})
    idlora_ext.calibrate(model, [inputs()], progress=False)
    randomize_adapter(model).save_pretrained(tmp_path)
    saved = load_file(tmp_path / WEIGHTS)
    assert saved[LAYER + "idlora_adapter.B"].dtype == saved[LAYER + "idlora_adapter.mean"].dtype == torch.float32
    loaded = LOADERS[loader](tiny_llama().bfloat16(), tmp_path)
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in loaded.state_dict().items()}
    for name, tensor in saved.items():
        there = tensors[name.removeprefix("base_model.model.").replace("idlora_adapter", "idlora_adapter.default")]
        assert there.dtype == tensor.dtype, name
        assert torch.equal(there, tensor), name
    assert torch.equal(logits(loaded), logits(model))


# ---- what must not get in ----


def edit(change):
    def apply_to(directory):
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})

    return apply_to


def set_index(values):
    def change(tensors):
        index = tensors[LAYER + "idlora_adapter.index"]
        index.view(-1)[: len(values)] = torch.tensor(values, dtype=torch.int32)

    return edit(change)


def rename(tensors):
    tensors[LAYER.replace("q_proj", "x_proj") + "idlora_adapter.B"] = tensors[LAYER + "idlora_adapter.B"].clone()


def shorten(tensors):
    tensors[LAYER + "idlora_adapter.B"] = tensors[LAYER + "idlora_adapter.B"][:-1].clone()


def edit_config(**values):
    def apply_to(directory):
        file = directory / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return apply_to


BASE_WEIGHT = "base_model.model.model.layers.0.mlp.up_proj.weight"
DEFECTS = {
    "missing B": (edit(lambda t: t.pop(LAYER + "idlora_adapter.B")), r"lacks 1 tensors.*q_proj.idlora_adapter.B"),
    "missing index": (edit(lambda t: t.pop(LAYER + "idlora_adapter.index")), r"lacks 1 tensors.*q_proj.idlora_adapter.index"),
    "missing fingerprint": (edit(lambda t: t.pop(LAYER + "idlora_adapter.fingerprint")), r"lacks 1 tensors"),
    "extra": (edit(rename), r"1 tensors that the model has no place for.*x_proj.idlora_adapter.B"),
    "a weight of the base model": (edit(lambda t: t.update({BASE_WEIGHT: torch.zeros(128, 64)})), r"no place for: .*mlp.up_proj.weight"),
    "the weight under an adapter": (edit(lambda t: t.update({LAYER + "base_layer.weight": torch.zeros(64, 64)})), r"no place for: .*q_proj.base_layer.weight"),
    "an index by its full name": (edit(lambda t: t.update({LAYER + "idlora_adapter.default.index": torch.zeros(2, 8, dtype=torch.int32)})), r"no place for: .*adapter.default.index"),
    "a newer format": (edit_config(format_version=2), r"saved by a newer idlora_ext, in format 2; this one reads formats up to 1"),
    "foreign": (edit(lambda t: t.update(foo=torch.zeros(2))), r"no place for: foo"),
    "wrong shape": (edit(shorten), r"q_proj.idlora_adapter.B: the file has shape \[31, 4\], the model \[32, 4\]"),
    "out of range": (set_index([64]), r"q_proj.idlora_adapter.index: entries must lie in \[0, 64\), got 0 to 64|entries must lie in \[0, 64\)"),
    "negative": (set_index([-1]), r"entries must lie in \[0, 64\), got -1"),
    "duplicate": (set_index([3, 3]), "q_proj.idlora_adapter.index: entries must be distinct"),
    "float index": (edit(lambda t: t.update({LAYER + "idlora_adapter.index": t[LAYER + "idlora_adapter.index"].float()})), "idlora_adapter.index: the file has torch.float32"),
    "more layers in the configuration": (edit_config(target_modules=["q_proj", "k_proj", "v_proj"]), r"lacks 16 tensors.*k_proj"),
    "other rank in the configuration": (edit_config(r=16), r"idlora_adapter\.\w+: the file has shape"),
    "not safetensors": (lambda d: (d / WEIGHTS).write_bytes(b"no"), "not a readable safetensors file|Error|header"),
}  # fmt: skip


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("defect", DEFECTS)
def test_defective_files_are_refused_before_anything_changes(defect, loader, tmp_path):
    spoil, message = DEFECTS[defect]
    trained(target_modules=["q_proj"]).save_pretrained(tmp_path)
    spoil(tmp_path)
    model = tiny_llama()
    before, output = state_of(model), logits(model)
    error = Exception if defect == "not safetensors" and loader != "load" else ValueError
    with pytest.raises(error, match=message):
        LOADERS[loader](model, tmp_path)
    if defect == "not safetensors" and loader.startswith("PeftModel"):
        # PEFT reads the file between injecting and asking us, so the layers are there; but they say so, and can go.
        with pytest.raises(ValueError, match="never loaded"):
            logits(model)
        idlora_ext.remove(model)
    assert state_of(model) == before
    assert torch.equal(logits(model), output)


@pytest.mark.parametrize("loader", LOADERS)
def test_wrong_base_is_an_error_that_names_the_first_layer_that_differs(loader, tmp_path):
    trained().save_pretrained(tmp_path)
    model = tiny_llama()
    nn.init.normal_(model.model.layers[1].mlp.up_proj.weight)
    before, output = state_of(model), logits(model)
    with pytest.raises(
        ValueError, match=r"first layer that differs is 'model\.layers\.1\.mlp\.up_proj'.*base_mismatch"
    ):
        LOADERS[loader](model, tmp_path)
    assert state_of(model) == before
    assert torch.equal(logits(model), output)


def test_a_flag_turns_a_wrong_base_into_a_warning(tmp_path):
    trained().save_pretrained(tmp_path)
    config = IdLoraConfig.from_pretrained(tmp_path)
    config.base_mismatch = "warn"
    with pytest.warns(UserWarning, match=r"first layer that differs is 'model.layers.0.self_attn.q_proj'"):
        idlora_ext.load(tiny_llama(seed=1), tmp_path, base_mismatch="warn")
    with pytest.warns(UserWarning, match="first layer that differs"):
        PeftModel.from_pretrained(tiny_llama(seed=1), tmp_path, config=config)
    with pytest.warns(UserWarning, match="first layer that differs"):
        tiny_llama(seed=1).load_adapter(tmp_path, peft_config=config)
    with pytest.raises(ValueError, match="shape"):  # a flag cannot make it fit
        idlora_ext.load(tiny_llama(intermediate_size=96), tmp_path, base_mismatch="warn")


def test_a_file_cannot_relax_the_check(tmp_path):
    trained().save_pretrained(tmp_path)
    assert "base_mismatch" not in json.loads((tmp_path / "adapter_config.json").read_text())
    edit_config(base_mismatch="warn")(tmp_path)
    for load in LOADERS.values():
        with pytest.warns(UserWarning, match="base_mismatch.*ignored"), pytest.raises(ValueError, match="differs"):
            load(tiny_llama(seed=1), tmp_path)


def test_reloading_in_place_checks_as_well(tmp_path):
    model = trained()
    idlora_ext.save(model, tmp_path)
    expected = logits(model)
    randomize_adapter(model, seed=9)
    other = logits(model)
    idlora_ext.load(model, tmp_path, is_trainable=True)
    assert torch.equal(logits(model), expected)
    randomize_adapter(model, seed=9)
    set_index([3, 3])(tmp_path)
    with pytest.raises(ValueError, match="distinct"):
        idlora_ext.load(model, tmp_path)
    assert torch.equal(logits(model), other)


def test_a_failing_load_beside_another_adapter_leaves_that_one_alone(tmp_path):
    trained().save_pretrained(tmp_path)
    set_index([3, 3])(tmp_path)
    for load in (lambda m: idlora_ext.load(m, tmp_path, "b"), lambda m: m.load_adapter(tmp_path, adapter_name="b")):
        model = trained()
        before, output = state_of(model), logits(model)
        with pytest.raises(ValueError, match="distinct"):
            load(model)
        assert state_of(model) == before
        assert torch.equal(logits(model), output)
    peft_model = randomize_adapter(get_peft_model(tiny_llama(), IdLoraConfig(**FIELDS)))
    output = logits(peft_model)
    with pytest.raises(ValueError, match="distinct"):
        peft_model.load_adapter(tmp_path, "b")
    assert list(peft_model.peft_config) == ["default"]
    assert torch.equal(logits(peft_model), output)


def test_a_saved_configuration_without_its_tensors_is_noticed(tmp_path):
    trained().save_pretrained(tmp_path)
    config = IdLoraConfig.from_pretrained(tmp_path)
    model = get_peft_model(tiny_llama(), config)
    with pytest.raises(ValueError, match=r"never loaded.*index_stored = False"):
        logits(model)
    with pytest.raises(ValueError, match="has no rows yet"):
        idlora_ext.save(model, tmp_path / "other")
    config.index_stored = False
    logits(get_peft_model(tiny_llama(), config))


def test_broken_and_foreign_directories(tmp_path):
    with pytest.raises(ValueError, match=r"adapter_config.json: not a readable adapter configuration"):
        idlora_ext.load(tiny_llama(), tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="peft_type must be IDLORA, got LORA"):
        idlora_ext.load(tiny_llama(), tmp_path)
    trained().save_pretrained(tmp_path)
    os.remove(tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=WEIGHTS):
        idlora_ext.load(tiny_llama(), tmp_path)
    with pytest.raises(ValueError, match="no ID-LoRA adapter 'default'"):
        idlora_ext.save(tiny_llama(), tmp_path)


def test_an_interrupted_save_leaves_the_old_files(tmp_path, monkeypatch):
    model = trained()
    idlora_ext.save(model, tmp_path)
    before = {file: (tmp_path / file).read_bytes() for file in os.listdir(tmp_path)}
    randomize_adapter(model, seed=3)

    def full_disk(tensors, file, **kwargs):
        with open(file, "wb") as half:
            half.write(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(idlora_ext.tuner.files, "save_file", full_disk)
    with pytest.raises(OSError, match="disk full"):
        idlora_ext.save(model, tmp_path)
    assert {file: (tmp_path / file).read_bytes() for file in os.listdir(tmp_path)} == before


def test_fingerprint_tells_precision_from_other_weights():
    torch.manual_seed(0)
    W = torch.randn(96, 200)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert difference(fingerprint(W), fingerprint(W.to(dtype))) is None
        assert difference(fingerprint(W.to(dtype)), fingerprint(W)) is None
    eight_bit = (W / W.abs().max() * 127).round() / 127 * W.abs().max()
    assert difference(fingerprint(W), fingerprint(eight_bit, torch.int8)) is None
    assert difference(fingerprint(W), fingerprint(eight_bit)) is not None  # as float32 it is another weight
    tuned = W + 0.02 * torch.randn_like(W)  # a fine-tuned sibling
    assert "differ by 0.0" in (difference(fingerprint(W), fingerprint(tuned)) or "")
    assert "differ by" in (difference(fingerprint(W.bfloat16()), fingerprint(tuned.bfloat16())) or "")
    assert "shape" in (difference(fingerprint(W), fingerprint(W[:95])) or "")
    assert difference(fingerprint(W), fingerprint(W.to("meta"))) is None
    assert fingerprint(W).dtype == torch.int32
    assert torch.equal(fingerprint(W), fingerprint(W.t().contiguous().t()))


def test_loading_onto_another_precision_of_the_same_base(tmp_path):
    trained().save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        idlora_ext.load(tiny_llama().bfloat16(), tmp_path)
