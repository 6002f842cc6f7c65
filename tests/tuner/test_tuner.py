"""apply, remove, summary, and PEFT's and transformers' own doors to the same layers."""

from __future__ import annotations

import copy
import warnings
from unittest import mock

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import idlora_ext
from idlora_ext import IdLoraConfig, reference
from idlora_ext.layer import adapter
from idlora_ext.layer.config import fit_rank
from tests.helpers.models import (
    FIELDS,
    MODELS,
    PLAIN,
    inputs,
    layers_of,
    logits,
    randomize_adapter,
    state_of,
    tiny_bert,
    tiny_llama,
)

DOORS = {
    "apply": lambda model, **fields: idlora_ext.apply(model, **fields),
    "inject": lambda model, **fields: inject_adapter_in_model(IdLoraConfig(**fields), model),
    "add_adapter": lambda model, **fields: model.add_adapter(IdLoraConfig(**fields)) or model,
    "get_peft_model": lambda model, **fields: get_peft_model(model, IdLoraConfig(**fields)),
}


@pytest.fixture(params=PLAIN)
def kind(request):
    return request.param


@pytest.mark.parametrize("door", DOORS)
def test_every_door_adapts_every_linear_layer(kind, door):
    model = MODELS[kind].make()
    before = logits(model)
    targets = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))} - {"lm_head", "classifier"}
    adapted = DOORS[door](model, **MODELS[kind].fields())
    layers = layers_of(adapted)
    assert set(layers) == targets
    assert all(layer.idlora_adapter["default"].B.count_nonzero() == 0 for layer in layers.values())
    assert all(layer.idlora_adapter["default"].router.count_nonzero() for layer in layers.values())
    trainable = {n for n, p in adapted.named_parameters() if p.requires_grad and "classifier" not in n}
    assert all(n.endswith(".router") or n.endswith(".B") for n in trainable)
    assert len(trainable) == 2 * len(targets)
    biased = any(layer.bias is not None for layer in layers.values())
    torch.testing.assert_close(logits(adapted), before, rtol=1e-4 if biased else 0, atol=1e-4 if biased else 0)


def test_same_configuration_gives_the_same_adapter_by_every_door(kind):
    tensors = {}
    for door, adapt in DOORS.items():
        model = adapt(MODELS[kind].make(), **MODELS[kind].fields(shared_router=False, seed=3))
        tensors[door] = {
            name + key: value
            for name, layer in layers_of(model).items()
            for key, value in layer.state_dict().items()
            if "idlora" in key
        }
    for door in DOORS:
        assert tensors[door].keys() == tensors["apply"].keys()
        assert all(torch.equal(value, tensors["apply"][key]) for key, value in tensors[door].items())


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-cluster"])
def test_adapted_layer_is_the_papers_equation(kind, shared):
    model = randomize_adapter(
        idlora_ext.apply(MODELS[kind].make(), **MODELS[kind].fields(shared_router=shared, scaling=0.5))
    )
    model.double()
    for layer in layers_of(model).values():
        h = torch.randn(3, layer.in_features, dtype=torch.float64)
        W = layer.get_base_weight()
        assert W.shape == (layer.out_features, layer.in_features)
        index, router, B = (getattr(layer.idlora_adapter["default"], n) for n in ("index", "router", "B"))
        expected = reference.linear(h, W, layer.bias, index, router, B, 0.5)
        torch.testing.assert_close(layer(h), expected, rtol=1e-10, atol=1e-10)
        x = torch.einsum("nd,krd->nkr", h, W[index.long()])
        torch.testing.assert_close(layer.alpha(h).double(), (x * router).sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_untrained_layers_return_the_base_output(kind, dtype):
    """Without bias bit for bit; with a bias within one extra rounding of the output's dtype."""
    base = MODELS[kind].make().to(dtype)
    for layer in layers_of(idlora_ext.apply(base, **MODELS[kind].fields())).values():
        h = torch.randn(50, layer.in_features).to(dtype)
        expected = layer.base_layer(h)
        y = layer(h)
        assert y.dtype == expected.dtype
        if layer.bias is None:
            assert torch.equal(y, expected)
            continue
        # y0 is rounded before the bias comes: half a unit in the last place of y0, and the base's own last rounding.
        y0 = h.double() @ layer.get_base_weight().double().T
        exact = y0 + layer.bias.double()
        accumulation = 2**-22 * (
            h.double().abs() @ layer.get_base_weight().double().abs().T + layer.bias.double().abs()
        )
        eps = torch.finfo(dtype).eps
        assert ((y.double() - exact).abs() <= eps / 2 * (y0.abs() + 1.01 * exact.abs()) + accumulation).all()


def test_large_biases_do_not_reach_the_gathered_columns():
    """Qwen2's biases are in the hundreds: taken off a bfloat16 output again, they would leave noise."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 64).to(torch.bfloat16)
    nn.init.normal_(linear.bias, std=300.0)
    model = randomize_adapter(idlora_ext.apply(nn.Sequential(linear), target_modules=["0"], **FIELDS))
    layer = model[0]
    h = torch.randn(100, 64, dtype=torch.bfloat16)
    exact = torch.einsum(
        "nd,krd->nkr", h.double(), linear.weight.double()[layer.idlora_adapter["default"].index.long()]
    )
    exact = (exact * layer.idlora_adapter["default"].router.double()).sum(-1)
    assert (layer.alpha(h).double() - exact).abs().max() < 0.02 * exact.abs().max()


def test_opaque_base_layer_with_a_bias():
    """A layer that adds its bias itself - here one with a forward hook - has bias[index] taken off what is gathered."""
    torch.manual_seed(0)
    model = randomize_adapter(idlora_ext.apply(nn.Sequential(nn.Linear(32, 32)), target_modules=["0"], **FIELDS))
    h = torch.randn(5, 32)
    plain = model(h)
    called = []
    model[0].base_layer.register_forward_hook(lambda *_: called.append(True))
    torch.testing.assert_close(model(h), plain)
    assert called, "the hook of the base layer was bypassed"


def test_remove_restores_objects_outputs_and_trainability(kind):
    model = MODELS[kind].make()
    next(model.parameters()).requires_grad_(False)  # what was frozen before stays frozen
    before, output = state_of(model), logits(model)
    assert idlora_ext.apply(model, **MODELS[kind].fields()) is model
    randomize_adapter(model)
    assert not torch.equal(logits(model), output)
    assert idlora_ext.remove(model) is model
    assert state_of(model) == before
    assert torch.equal(logits(model), output)
    with pytest.raises(ValueError, match="the model has no ID-LoRA adapter"):
        idlora_ext.remove(model)
    idlora_ext.apply(model, **MODELS[kind].fields())  # and it can be adapted again


def test_remove_takes_a_peft_model_apart_too():
    base = tiny_llama()
    before, output = state_of(base), logits(base)
    assert idlora_ext.remove(get_peft_model(base, IdLoraConfig(**FIELDS))) is base
    assert state_of(base) == before
    assert torch.equal(logits(base), output)


def test_several_adapters():
    model = tiny_llama()
    base = logits(model)
    randomize_adapter(idlora_ext.apply(model, adapter_name="a", **FIELDS), "a", seed=1)
    only_a = logits(model)
    idlora_ext.apply(model, adapter_name="b", target_modules=["q_proj", "up_proj"], shared_router=False, **FIELDS)
    randomize_adapter(model, "b", seed=2)
    only_b = logits(model)  # the newest adapter is the active one
    model.set_adapter("a")
    assert torch.equal(logits(model), only_a)
    model.set_adapter("b")
    assert torch.equal(logits(model), only_b)
    model.set_adapter(["a", "b"])  # a sum of updates of the same base output, in whatever order
    both = logits(model)
    model.set_adapter(["b", "a"])
    torch.testing.assert_close(logits(model), both, rtol=1e-4, atol=1e-5)
    layer = model.model.layers[0].self_attn.q_proj
    h = torch.randn(3, 64)
    separately = []
    for name in ("a", "b"):
        layer.set_adapter(name)
        separately.append(layer(h) - layer.base_layer(h))
    layer.set_adapter(["a", "b"])
    torch.testing.assert_close(layer(h), layer.base_layer(h) + separately[0] + separately[1])

    model.set_adapter(["a", "b"])
    idlora_ext.remove(model, "a")
    assert torch.equal(logits(model), only_b)
    assert not any(n.startswith("model.layers.0.mlp.gate_proj.idlora") for n, _ in model.named_parameters())
    assert type(model.model.layers[0].mlp.gate_proj) is nn.Linear
    idlora_ext.remove(model, "b")
    assert torch.equal(logits(model), base)


def test_disabling_is_bit_equal_to_the_base(kind):
    base = logits(MODELS[kind].make())
    model = randomize_adapter(idlora_ext.apply(MODELS[kind].make(), **MODELS[kind].fields()))
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    assert not torch.equal(logits(model), base)
    peft_model = randomize_adapter(get_peft_model(MODELS[kind].make(), IdLoraConfig(**MODELS[kind].fields())))
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), base)


def test_narrow_layers_shrink_with_one_message():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = idlora_ext.apply(tiny_llama(), r=32, num_clusters=2)
    messages = [str(w.message) for w in caught if "narrow" in str(w.message)]
    assert len(messages) == 1
    assert "4 of 14 layers" in messages[0]
    assert "model.layers.{0-1}.self_attn.k_proj (d = 32: r = 16 instead of 32)" in messages[0]
    summary = idlora_ext.summary(model)
    assert {row.name.rpartition(".")[2]: row.r for row in summary.rows if row.shrunk} == {"k_proj": 16, "v_proj": 16}


def test_without_gradients_a_layer_writes_into_what_its_base_returned(kind):
    """But where something else may hold that: a hooked base layer, an output that is wanted for itself."""
    model = MODELS[kind].make()
    idlora_ext.apply(model, **MODELS[kind].fields())
    randomize_adapter(model.eval())
    expected = logits(model)
    with mock.patch.object(adapter, "adapt_in_place", side_effect=adapter.adapt_in_place) as in_place:
        with torch.enable_grad():
            with_gradients = model(**inputs()).logits
        assert not in_place.call_count
        assert torch.equal(logits(model), with_gradients)
        assert in_place.call_count
        kept = {}
        for name, layer in layers_of(model).items():
            layer.base_layer.register_forward_hook(lambda _, h, y, name=name: kept.update({name: (h[0].clone(), y)}))
        in_place.reset_mock()
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)  # a bias is added elsewhere
        assert not in_place.call_count
    for name, layer in layers_of(model).items():
        h, y = kept[name]
        assert torch.equal(y, layer.base_layer(h)), name


def test_fit_rank():
    assert fit_rank(4096, 4, 128, 2) == 128
    assert fit_rank(192, 4, 128, 2) == 48
    assert fit_rank(198, 4, 128, 2) == 48  # 49 fits, but is odd
    assert fit_rank(15, 2, 4, 2) == 0  # s does not divide d
    assert fit_rank(3, 2, 4, 2) == 0


def test_targeting_fields():
    def adapted(**fields):
        return set(layers_of(idlora_ext.apply(tiny_llama(), **(FIELDS | fields))))

    every = adapted()
    assert len(every) == 14
    assert adapted(exclude_modules=["q_proj"]) == {n for n in every if not n.endswith("q_proj")}
    assert adapted(layers_to_transform=[1]) == {n for n in every if ".1." in n}
    assert adapted(layers_to_transform=1, layers_pattern="layers") == {n for n in every if ".1." in n}
    assert adapted(target_modules=r".*\.0\..*_proj") == {n for n in every if ".0." in n}
    assert adapted(target_modules=["q_proj"], layers_to_transform=[0]) == {"model.layers.0.self_attn.q_proj"}


def test_rank_pattern_and_seed():
    model = idlora_ext.apply(tiny_llama(), rank_pattern={"q_proj": 4, r"layers\.1\.mlp\.up_proj": 16}, **FIELDS)
    ranks = {row.name: row.r for row in idlora_ext.summary(model).rows}
    assert ranks["model.layers.0.self_attn.q_proj"] == 4
    assert ranks["model.layers.1.mlp.up_proj"] == 16
    assert ranks["model.layers.0.mlp.up_proj"] == 8

    def router(seed):
        return layers_of(idlora_ext.apply(tiny_llama(), seed=seed, **FIELDS))["model.layers.0.self_attn.q_proj"]

    assert torch.equal(router(1).idlora_adapter["default"].router, router(1).idlora_adapter["default"].router)
    assert not torch.equal(router(1).idlora_adapter["default"].router, router(2).idlora_adapter["default"].router)


def test_clusters_pattern(tmp_path):
    fields = {"clusters_pattern": {"q_proj": 4, r"layers\.1\.mlp\.up_proj": 1, "v_proj": 8}, "shared_router": False}
    with pytest.warns(UserWarning, match=r"v_proj \(d = 32, k = 8: r = 4 instead of 8\)"):
        model = randomize_adapter(idlora_ext.apply(tiny_llama(), **(FIELDS | fields)))
    sizes = {row.name.removeprefix("model.layers."): (row.k, row.r) for row in idlora_ext.summary(model).rows}
    assert sizes["0.self_attn.q_proj"] == (4, 8)
    assert sizes["1.mlp.up_proj"] == (1, 8)
    assert sizes["0.mlp.up_proj"] == (2, 8)
    assert sizes["0.self_attn.v_proj"] == (8, 4)
    layer = layers_of(model)["model.layers.0.self_attn.q_proj"]
    assert layer.idlora_adapter["default"].index.shape == layer.idlora_adapter["default"].router.shape == (4, 8)
    assert layer.idlora_adapter["default"].index.unique().numel() == 32
    idlora_ext.save(model, tmp_path)
    assert torch.equal(logits(idlora_ext.load(tiny_llama(), tmp_path)), logits(model))
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))


def test_new_classification_head_is_trained_in_full():
    model = idlora_ext.apply(tiny_bert(), **FIELDS)
    head = {n for n, p in model.named_parameters() if p.requires_grad and "idlora" not in n}
    assert head == {"classifier.modules_to_save.default.weight", "classifier.modules_to_save.default.bias"}
    assert idlora_ext.summary(model).other_trainable == 3 * 64 + 3


def test_summary_prints_and_is_data():
    model = idlora_ext.apply(tiny_llama(), **FIELDS)
    summary = idlora_ext.summary(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    assert summary.trainable_parameters == trainable == summary.B_parameters + summary.router_parameters
    assert summary.total_parameters == total
    assert summary.to_dict()["percent"] == pytest.approx(100 * trainable / total)
    assert sum(row.share for row in summary.rows) == pytest.approx(1)
    first = summary.rows[0]
    assert (first.name, first.d, first.d_in, first.k, first.r, first.s) == (
        "model.layers.0.self_attn.q_proj",
        64,
        64,
        2,
        8,
        2,
    )
    text = str(summary)
    assert "model.layers.1.mlp.down_proj" in text
    assert f"{trainable:,} trainable of {total:,}" in text
    with pytest.raises(ValueError, match="no ID-LoRA adapter 'other'"):
        idlora_ext.summary(model, "other")


def test_plain_modules_need_no_transformers_model():
    model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 20))
    before = model(torch.ones(1, 20))
    idlora_ext.apply(model, **FIELDS)
    assert len(layers_of(model)) == 2
    torch.testing.assert_close(model(torch.ones(1, 20)), before)


def test_dropout_acts_on_z_while_training():
    model = randomize_adapter(idlora_ext.apply(tiny_llama(), dropout=0.5, **FIELDS))
    layer = next(iter(layers_of(model).values()))
    h = torch.randn(4, 64)
    still = layer.eval()(h)
    layer.train()
    base = layer.base_layer(h)
    updates = torch.stack([layer(h) - base for _ in range(2000)])
    assert not torch.equal(updates[0], updates[1])
    # An unbiased estimate: 2000 draws, each as noisy as the update is large, average to within 5 standard errors.
    assert ((updates.mean(0) - (still - base)).abs() <= 5 * updates.std(0) / 2000**0.5 + 1e-6).all()


def test_adapter_parameters_of_half_precision_models():
    model = idlora_ext.apply(tiny_llama().bfloat16(), **FIELDS)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    kept = get_peft_model(tiny_llama().bfloat16(), IdLoraConfig(**FIELDS), autocast_adapter_dtype=False)
    assert {p.dtype for p in kept.parameters() if p.requires_grad} == {torch.bfloat16}
    assert logits(kept).dtype == torch.bfloat16


def test_merging_is_refused_before_anything_changes():
    peft_model = randomize_adapter(get_peft_model(tiny_llama(), IdLoraConfig(**FIELDS)))
    before = logits(peft_model)
    for merge in (peft_model.merge_adapter, peft_model.merge_and_unload):
        with pytest.raises(ValueError, match=r"layer 'model.*cannot be merged.*depend on the token"):
            merge()
        assert torch.equal(logits(peft_model), before)


@pytest.mark.compiled
def test_compiles_as_a_whole_without_graph_breaks():
    model = randomize_adapter(idlora_ext.apply(tiny_llama(num_hidden_layers=1), **FIELDS)).train()
    eager = model(**inputs(), labels=inputs()["input_ids"]).loss
    eager.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True)
    loss = compiled(**inputs(), labels=inputs()["input_ids"]).loss
    loss.backward()
    torch.testing.assert_close(loss, eager)
    assert gradients.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5)


def test_deepcopy_and_training_step():
    model = idlora_ext.apply(tiny_llama(), **FIELDS).train()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-2)
    batch = inputs(4, 16)
    losses = []
    for _ in range(20):
        loss = twin(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert torch.equal(logits(model.eval()), logits(tiny_llama()))
