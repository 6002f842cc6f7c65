"""Without gradients on a CPU an adapter writes over the base output: it must return the same bits, whatever happens."""

from __future__ import annotations

import copy
import pickle
from unittest import mock

import pytest
import torch
from torch import nn
from torch.func import functional_call

import idlora_ext
from idlora_ext.layer import adapter

H = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(3))
FIELDS = {"r": 8, "num_clusters": 2, "target_modules": ["0"]}


def model_of(**fields) -> nn.Module:
    """One layer, adapted and trained a little, and used once."""
    torch.manual_seed(0)
    model = idlora_ext.apply(nn.Sequential(nn.Linear(24, 64)), **FIELDS | fields)
    layer = model[0]
    layer(H)
    with torch.no_grad():
        for parameter in layer.idlora_adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    same(model.eval())
    return model


def same(model: nn.Module, h: torch.Tensor = H, taken: bool = True) -> torch.Tensor:
    """The outputs with and without gradients are the same bits, and the base output was written over if ``taken``."""
    expected = model(h).detach()
    with torch.no_grad(), mock.patch.object(adapter, "adapt_in_place", wraps=adapter.adapt_in_place) as in_place:
        assert torch.equal(model(h), expected)
        assert in_place.called == taken
    return expected


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"center": False},
        {"selection": "nearest", "row_scale": False},
        {"router": "linear", "center": False},
        {"router": "bounded", "selection": "pivoted_qr_whole", "row_scale": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_form(fields, dtype):
    same(model_of(**fields).to(dtype), H.to(dtype))


def scaled(model):
    model[0].set_scale("default", 3.0)


def scaled_by_hand(model):
    model[0].idlora_adapter["default"].scaling *= 2


def another_parameter(model):
    model[0].idlora_adapter["default"].B = nn.Parameter(model[0].idlora_adapter["default"].B.detach() * 2)


def another_buffer(model):
    model[0].idlora_adapter["default"].mean = model[0].idlora_adapter["default"].mean + 1


def assigned_from_a_file(model):
    state = {name: tensor * 2 if name.endswith("default.B") else tensor for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def another_base(model):
    model[0].base_layer = nn.Linear(24, 64)


def another_adapter(model):
    idlora_ext.apply(model, adapter_name="second", **FIELDS | {"seed": 1, "scaling": 0.5, "center": False})
    nn.init.normal_(model[0].idlora_adapter["second"].B)


def made_anew(model):
    idlora_ext.remove(model)
    idlora_ext.apply(model, **FIELDS | {"seed": 1})
    model(H)
    nn.init.normal_(model[0].idlora_adapter["default"].B)


@pytest.mark.parametrize(
    "change",
    [scaled, scaled_by_hand, another_parameter, another_buffer, assigned_from_a_file, another_base, another_adapter,
     made_anew],
)  # fmt: skip
def test_what_changes_is_seen(change):
    model = model_of()
    before = same(model)
    change(model)
    assert not torch.equal(same(model), before)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_tensors_of_its_own(duplicate):
    model = model_of()
    before = same(model)
    other = duplicate(model)
    nn.init.normal_(other[0].idlora_adapter["default"].B)
    assert not torch.equal(same(other), before)
    assert torch.equal(same(model), before)


def test_functional_call():
    model = model_of()
    with torch.no_grad():
        before = model(H)
        twice = {"0.idlora_adapter.default.B": 2 * model[0].idlora_adapter["default"].B}
        there = functional_call(model, twice, (H,))
        model[0].idlora_adapter["default"].B.mul_(2)
        assert torch.equal(there, same(model))
        assert not torch.equal(there, before)


def test_what_is_left_to_forward():
    model = model_of(dropout=0.5)
    with torch.no_grad():
        with mock.patch.object(adapter, "adapt_in_place") as in_place:
            model.train()(H)
        assert not in_place.called  # dropout
    model = model_of()
    calls = []
    handle = model[0].base_layer.register_forward_hook(lambda *_: calls.append(1))
    same(model, taken=False)
    assert len(calls) == 2
    handle.remove()
    same(model)
    model[0].enable_adapters(False)
    assert torch.equal(same(model, taken=False), model[0].base_layer(H))
    model[0].enable_adapters(True)
    model[0].merge()
    same(model, taken=False)
    model[0].unmerge()
    same(model)
