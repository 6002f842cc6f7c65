"""One adapter is one module: what other people's tools do with modules and their names works on it."""

from __future__ import annotations

import copy
import importlib
import pickle

import pytest
import torch
from peft import get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file
from torch import nn

import idlora_ext
from idlora_ext import IdLoraConfig
from idlora_ext.layer.adapter import Adapter
from tests.helpers.commands import python
from tests.helpers.models import FIELDS, inputs, layers_of, logits, randomize_adapter, tiny_gpt2, tiny_llama

SIZES = {"r": 8, "num_clusters": 2}
FORMS = {
    "default": SIZES,
    "bounded": SIZES | {"router": "bounded", "center": False},
    "paper": SIZES | {"preset": "paper"},
}
replicas = importlib.import_module("torch.nn.parallel.replicate")  # the name is also a function's


@pytest.fixture(params=FORMS)
def model(request) -> nn.Module:
    model = idlora_ext.apply(tiny_llama(), progress=False, **FORMS[request.param])
    if request.param == "default":
        idlora_ext.calibrate(model, [inputs()], progress=False)
    return randomize_adapter(model)


def test_names_say_whose_they_are_and_are_not_loras(model):
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(layers_of(model))
    for name in trained:
        assert ".default." in name
        assert ".idlora_" in name
        assert "lora_A" not in name
        assert "lora_B" not in name


def test_lora_plus_does_not_take_B_for_loras(model):
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rates[id(layer.idlora_adapter["default"].B)] for layer in layers_of(model).values()} == {1e-3}


def test_replicas_of_data_parallel_have_the_adapter(model, monkeypatch):
    """Replicas hold plain tensors in the place of parameters; on a machine without GPUs they are copies on the CPU."""

    def copies(tensors, devices, detach=False):
        return [[t.detach() if detach else t.clone() for t in tensors] for _ in devices]

    monkeypatch.setattr(replicas, "_get_device_index", lambda device, *_: device)
    monkeypatch.setattr(replicas, "_broadcast_coalesced_reshape", copies)
    expected, base = logits(model), logits(tiny_llama())
    for replica in replicas.replicate(model, [0, 1]):
        assert torch.equal(logits(replica), expected)
        assert not torch.equal(expected, base)
    first, _ = replicas.replicate(model, [0, 1])
    first.train()(**inputs()).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_a_mean_is_not_taken_in_a_replica(monkeypatch):
    model = idlora_ext.apply(tiny_llama(), progress=False, **SIZES)
    monkeypatch.setattr(replicas, "_get_device_index", lambda device, *_: device)
    monkeypatch.setattr(
        replicas, "_broadcast_coalesced_reshape", lambda tensors, devices, detach=False: [tensors for _ in devices]
    )
    with pytest.raises(ValueError, match=r"replica of nn.DataParallel would lose it.*calibrate"):
        replicas.replicate(model, [0])[0].train()(**inputs())


@pytest.mark.parametrize("form", ["bounded", "paper"])
def test_a_reference_adapter_made_by_name_is_exact(form):
    """As TRL makes one: a second adapter of the same configuration, and parameters copied by their names."""
    peft_model = randomize_adapter(get_peft_model(tiny_llama(), config := IdLoraConfig(**FORMS[form])).eval())
    peft_model.add_adapter("ref", config)
    parameters = dict(peft_model.named_parameters())
    for name, parameter in parameters.items():
        if ".default." in name:
            parameters[name.replace(".default.", ".ref.")].data.copy_(parameter.data)
    trained = logits(peft_model)
    peft_model.set_adapter("ref")
    assert torch.equal(logits(peft_model), trained)
    with peft_model.disable_adapter():
        assert not torch.equal(logits(peft_model), trained)


def test_offloading_brings_an_adapter_back_for_each_call(model):
    from accelerate import cpu_offload

    expected = logits(model)
    cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    adapter = next(iter(layers_of(model).values())).idlora_adapter["default"]
    assert adapter.B.is_meta
    assert torch.equal(logits(model), expected)


def test_export_leaves_the_model_alone(model):
    """Also one that has inferred before: nothing but modules holds its tensors."""
    x = inputs()["input_ids"]
    with torch.no_grad():
        expected = model(x).logits
        exported = torch.export.export(model, (x,), {"use_cache": False}, strict=False)
        torch.testing.assert_close(exported.module()(x, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(x).logits, expected)
        assert torch.equal(copy.deepcopy(model)(x).logits, expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x).logits, expected)


class Logits(nn.Module):
    """A transformers model whose output is a tensor, which programs of any reader know."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=False).logits


PROGRAM = """
import sys
sys.modules["idlora_ext"] = None  # any import of it fails
import torch
ids, expected = torch.load(sys.argv[1] + "/expected.pt")
found = torch.export.load(sys.argv[1] + "/program.pt2").module()(ids)
torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
"""


@pytest.mark.subprocess
def test_an_exported_program_runs_without_this_package(tmp_path):
    model = Logits(randomize_adapter(idlora_ext.apply(tiny_llama(), progress=False, **FORMS["paper"])).eval())
    ids = inputs()["input_ids"]
    with torch.no_grad():
        torch.save((ids, model(ids)), tmp_path / "expected.pt")
        torch.export.save(torch.export.export(model, (ids,)), tmp_path / "program.pt2")
    done = python("-c", PROGRAM, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.compiled
@pytest.mark.parametrize("model", ["default", "bounded"], indirect=True)
def test_onnx_of_a_model_with_its_adapter_attached(model, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, ids = Logits(model.eval()), inputs()["input_ids"]
    with torch.no_grad():
        expected = model(ids)
        torch.onnx.export(model, (ids,), tmp_path / "model.onnx", dynamo=True, verbose=False)
        assert torch.equal(model(ids), expected)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


def test_one_more_tensor_is_one_more_line(tmp_path, monkeypatch):
    original = Adapter.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.register_buffer("more", torch.zeros(3))

    monkeypatch.setattr(Adapter, "__init__", init)
    model = randomize_adapter(idlora_ext.apply(tiny_llama(), **FIELDS))
    for layer in layers_of(model).values():
        layer.idlora_adapter["default"].more.fill_(7)
    idlora_ext.save(model, tmp_path)
    tensors = load_file(file := tmp_path / "adapter_model.safetensors")
    assert sum(name.endswith(".idlora_adapter.more") for name in tensors) == len(layers_of(model))
    loaded = idlora_ext.load(tiny_llama(), tmp_path)
    assert all(layer.idlora_adapter["default"].more.tolist() == [7] * 3 for layer in layers_of(loaded).values())
    assert "more" in layers_of(loaded).popitem()[1].idlora_adapter["default"].chosen()
    save_file({name: tensor for name, tensor in tensors.items() if not name.endswith("more")}, file)
    with pytest.raises(ValueError, match=r"lacks 14 tensors that the model needs: .*idlora_adapter\.more"):
        idlora_ext.load(tiny_llama(), tmp_path)


@pytest.mark.parametrize("name", ["keys", "forward", "a.b"])
def test_names_that_no_module_can_have_are_refused(name):
    with pytest.raises(ValueError, match=rf"an adapter cannot be called {name!r}|without dots"):
        idlora_ext.apply(tiny_gpt2(), adapter_name=name, **FIELDS)
    with pytest.raises(ValueError, match=rf"an adapter cannot be called {name!r}"):
        get_peft_model(tiny_gpt2(), IdLoraConfig(**FIELDS), adapter_name=name)
