"""Variants of the method: bounded router, row scales, centring, and the preset that is none of them."""

from __future__ import annotations

import copy
import dataclasses
import zlib

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call

import idlora_ext
from idlora_ext import IdLoraConfig, reference
from idlora_ext.layer.adapter import Adapter
from idlora_ext.rows.row_scale import row_scale
from tests.helpers.models import (
    FIELDS,
    MODELS,
    PLAIN,
    inputs,
    layers_of,
    logits,
    randomize_adapter,
    tiny_llama,
    training_losses,
)
from tests.helpers.problems import each, named

DEFAULT = "static, scaled pivoted rows, centred"
VARIANTS = {
    "bounded": {"router": "bounded"},
    "bounded, scaled rows": {"router": "bounded", "row_scale": True},
    "linear, scaled rows": {"router": "linear", "row_scale": True, "shared_router": False},
    "static, scaled rows": {"router": "static", "row_scale": True},
    "static, a constant a cluster, scaled rows": {"router": "static", "row_scale": True, "shared_router": False},
    "linear, centred": {"router": "linear", "center": True},
    "static, centred": {"router": "static", "center": True},
    "bounded, scaled rows, centred": {"router": "bounded", "row_scale": True, "center": True},
    DEFAULT: {"router": "static", "selection": "pivoted_qr_whole", "row_scale": True, "center": True},
}
FILE = "adapter_model.safetensors"


@pytest.fixture(params=VARIANTS)
def variant(request):
    return VARIANTS[request.param]


def trained(model, adapter_name="default"):
    """Values for B, for the router and for a mean, as training would give them."""
    randomize_adapter(model, adapter_name, std=0.2)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith(f"idlora_adapter.{adapter_name}.router"):
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    for module in model.modules():
        if isinstance(module, Adapter) and module.name == adapter_name and module.mean is not None:
            module.mean.normal_(generator=generator)
            module.mean_taken = True
    return model


def stretched(model, seed=0):
    """Rows of very different norms, outliers among them, and one of zeros, in every linear layer."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear) and 16 <= module.out_features < 101:  # not heads
            factor = torch.exp(0.7 * torch.randn(len(module.weight), 1, generator=generator))
            factor[3], factor[5] = 30, 0
            module.weight.data *= factor.to(module.weight.dtype)
    return model


def options(layer, adapter="default"):
    """What the reference takes beside index, router and B."""
    return {name: getattr(layer.idlora_adapter[adapter], name) for name in ("row_scale", "mean", "bounded")}


def seed_of(layer):
    return zlib.crc32(layer.name.encode(), 0)


def expected(layer, h, adapter="default"):
    base = layer.get_base_layer()
    tensors = layer.idlora_adapter[adapter].tensors(h.dtype)
    return reference.linear(h, layer.get_base_weight(), base.bias, *tensors, **options(layer, adapter))


@each(variant=VARIANTS, kind=named(PLAIN))
def test_layers_follow_the_equation(variant, kind):
    model = trained(idlora_ext.apply(stretched(MODELS[kind].make().double()), **MODELS[kind].fields(**variant)))
    for name, layer in layers_of(model).items():
        h = torch.randn(3, 5, layer.in_features, dtype=torch.float64)
        torch.testing.assert_close(layer(h), expected(layer, h), rtol=1e-9, atol=1e-9, msg=name)
        index, router, _ = layer.idlora_adapter["default"].tensors(h.dtype)
        c, mean = options(layer)["row_scale"], options(layer)["mean"]
        y0 = layer.base_layer(h)
        offset = mean if mean is not None else 0 * y0[0, 0] if layer.bias is None else layer.bias
        x = [(y0 - offset)[..., rows] * (1 if c is None else c[i]) for i, rows in enumerate(index.long())]
        for i in range(len(x)):
            a_i = (
                reference.alpha(x, i, router, layer.idlora_adapter["default"].bounded).squeeze(-1).expand(3, 5).float()
            )
            torch.testing.assert_close(layer.alpha(h)[..., i], a_i, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients(variant, dropout):
    torch.manual_seed(0)
    model = stretched(nn.Sequential(nn.Linear(6, 16)).double())
    fields = {"r": 4, "num_clusters": 2, "target_modules": ["0"], "dropout": dropout, "progress": False}
    layer = trained(idlora_ext.apply(model, **fields | variant))[0]
    names = ("idlora_adapter.default.router", "idlora_adapter.default.B")
    parameters = [layer.get_parameter(name).detach().requires_grad_() for name in names]
    h = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def run(h, *tensors):
        torch.manual_seed(0)  # the same entries are dropped each time
        return functional_call(layer, dict(zip(names, tensors, strict=True)), (h,))

    assert torch.autograd.gradcheck(run, (h, *parameters))
    if not dropout:
        W, b, index = layer.get_base_weight(), layer.get_base_layer().bias, layer.idlora_adapter["default"].index
        g = torch.randn(3, 16, dtype=torch.float64)
        ours = torch.autograd.grad(run(h, *parameters), (h, *parameters), g)
        literal = reference.linear(h, W, b, index, *parameters, **options(layer))
        for ours_i, theirs in zip(ours, torch.autograd.grad(literal, (h, *parameters), g), strict=True):
            torch.testing.assert_close(ours_i, theirs, rtol=1e-9, atol=1e-9)


def test_a_bounded_router_starts_at_one_and_goes_by_direction():
    model = idlora_ext.apply(tiny_llama().double(), **FIELDS | {"router": "bounded"})
    static = idlora_ext.apply(tiny_llama().double(), **FIELDS | {"router": "static"})
    for ours, theirs in zip(layers_of(model).values(), layers_of(static).values(), strict=True):
        assert ours.idlora_adapter["default"].router.count_nonzero() == 0
        assert torch.equal(ours.idlora_adapter["default"].index, theirs.idlora_adapter["default"].index)
        h = torch.randn(3, ours.in_features, dtype=torch.float64)
        assert torch.equal(ours.alpha(h), torch.ones(3, 2))
    for start in (model, static):
        randomize_adapter(start)
    torch.testing.assert_close(logits(model), logits(static), rtol=1e-12, atol=1e-12)
    layer = next(iter(layers_of(trained(model)).values()))
    h = torch.randn(50, layer.in_features, dtype=torch.float64)
    a = layer.alpha(h)
    assert ((a >= 0) & (a <= 2)).all()
    assert a.std() > 0.1
    torch.testing.assert_close(layer.alpha(1000 * h), a, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.alpha(0 * h), torch.ones(50, 2))
    zero = torch.zeros(2, layer.in_features, dtype=torch.float64, requires_grad=True)
    layer(zero).sum().backward()
    assert zero.grad.isfinite().all()


def test_training_moves_what_is_trained(variant):
    model = idlora_ext.apply(tiny_llama(), **FIELDS | variant, dropout=0.1).train()
    before = copy.deepcopy(model.state_dict())
    losses = training_losses(model) + training_losses(model)
    assert losses[-1] < losses[0] - 0.1
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    kinds = (".router", ".B", ".mean")  # a mean is taken once
    assert moved == {name for name in before if "idlora_adapter" in name and name.endswith(kinds)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_autocast(variant, dtype):
    model = trained(idlora_ext.apply(tiny_llama(), **FIELDS | variant, target_modules=["up_proj"]))
    layer = next(iter(layers_of(model).values()))
    h = torch.randn(4, layer.in_features).to(dtype)
    exact = copy.deepcopy(layer).double()
    y = expected(exact, h.double()).detach()
    tolerance = 0.02 * float(y.abs().max())
    with torch.autocast("cpu", dtype=dtype):
        torch.testing.assert_close(layer(h).double(), y, rtol=0, atol=tolerance)
    layer.base_layer.to(dtype)
    assert layer(h).dtype == dtype
    torch.testing.assert_close(layer(h).double(), y, rtol=0, atol=tolerance)


def test_compiles_to_one_graph(variant):
    layer = next(iter(layers_of(trained(idlora_ext.apply(tiny_llama(), **FIELDS | variant))).values()))
    h = torch.randn(4, layer.in_features)
    torch.compiler.reset()  # each variant is a graph of its own
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(h), layer(h))


def test_saved_and_loaded_bit_for_bit(tmp_path, variant):
    model = trained(idlora_ext.apply(stretched(tiny_llama()), **FIELDS | variant))
    idlora_ext.save(model, tmp_path)
    has_scale = any(name.endswith("idlora_adapter.row_scale") for name in load_file(tmp_path / FILE))
    assert has_scale == variant.get("row_scale", False)
    for again in (
        idlora_ext.load(stretched(tiny_llama()), tmp_path),
        PeftModel.from_pretrained(stretched(tiny_llama()), tmp_path),
        idlora_ext.load(idlora_ext.apply(stretched(tiny_llama()), **FIELDS | variant, seed=7), tmp_path),
    ):
        assert torch.equal(logits(again), logits(model))


def test_files_that_mean_something_else_are_refused(tmp_path):
    idlora_ext.save(
        trained(idlora_ext.apply(tiny_llama(), **FIELDS | {"router": "bounded", "row_scale": True})), tmp_path
    )
    for fields, message in (
        ({"router": "linear", "row_scale": True}, "the file's router is bounded, that of adapter 'default'"),
        ({"router": "bounded"}, r"14 tensors that the model has no place for: .*down_proj.idlora_adapter.row_scale"),
    ):
        model = idlora_ext.apply(tiny_llama(), **FIELDS | fields)
        before = logits(model)
        with pytest.raises(ValueError, match=message):
            idlora_ext.load(model, tmp_path)
        assert torch.equal(logits(model), before)
    tensors = load_file(tmp_path / FILE)
    name = next(name for name in tensors if name.endswith("idlora_adapter.row_scale"))
    save_file(tensors | {name: tensors[name].index_fill(0, torch.tensor([1]), torch.nan)}, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"idlora_adapter\.row_scale: entries must be finite and not negative"):
        idlora_ext.load(tiny_llama(), tmp_path)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"lacks 1 tensors that the model needs: .*idlora_adapter.row_scale"):
        idlora_ext.load(tiny_llama(), tmp_path)


@pytest.mark.parametrize("shared", [True, False])
def test_scaled_rows_merge_and_export(tmp_path, shared):
    fields = FIELDS | {"router": "static", "row_scale": True, "shared_router": shared}
    model = trained(get_peft_model(stretched(tiny_llama().double()), IdLoraConfig(**fields)))
    attached = logits(model)
    idlora_ext.to_lora(model, tmp_path)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), attached, rtol=1e-9, atol=1e-9)
    model.unmerge_adapter()
    assert torch.equal(logits(model), attached)
    lora = PeftModel.from_pretrained(stretched(tiny_llama().double()), tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(logits(lora), attached, rtol=1e-9, atol=1e-9)
    without = get_peft_model(stretched(tiny_llama().double()), IdLoraConfig(**fields | {"row_scale": False}))
    assert (logits(trained(without)) - attached).abs().max() > 1e-3  # the scale is not idle here


def test_a_bounded_router_is_not_merged_or_exported(tmp_path):
    model = trained(get_peft_model(tiny_llama(), IdLoraConfig(**FIELDS | {"router": "bounded"})))
    before = logits(model)
    for attempt in (model.merge_adapter, model.merge_and_unload, lambda: idlora_ext.to_lora(model, tmp_path)):
        with pytest.raises(ValueError, match="with a linear or bounded router it cannot be merged"):
            attempt()
    assert torch.equal(logits(model), before)


def test_mixed_batch_sum_and_removal():
    model = get_peft_model(stretched(tiny_llama().double()), IdLoraConfig(**FIELDS), "linear")
    model.add_adapter("bounded", IdLoraConfig(**FIELDS | {"router": "bounded", "row_scale": True}))
    model.add_adapter("static", IdLoraConfig(**FIELDS | {"router": "static", "row_scale": True, "seed": 3}))
    names = ["linear", "bounded", "static"]
    for name in names:
        trained(model, name).eval()
    ids = inputs(batch=4)["input_ids"]
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=["static", "bounded", "__base__", "linear"]).logits
        for row, name in ((0, "static"), (1, "bounded"), (3, "linear")):
            model.set_adapter(name)
            alone = model(input_ids=ids[row : row + 1]).logits[0]
            torch.testing.assert_close(mixed[row], alone, rtol=1e-9, atol=1e-9)
    model.base_model.set_adapter(names)
    layer = next(iter(layers_of(model).values()))
    h = torch.randn(4, layer.in_features, dtype=torch.float64)
    y0 = layer.base_layer(h)
    update = sum(expected(layer, h, name) - y0 for name in names)
    torch.testing.assert_close(layer(h), y0 + update, rtol=1e-9, atol=1e-9)
    idlora_ext.remove(model, "bounded")
    assert "bounded" not in layer.idlora_adapter
    assert [name for name, held in layer.idlora_adapter.items() if held.row_scale is not None] == ["static"]


def test_scaled_rows_have_the_median_norm():
    for layer in layers_of(idlora_ext.apply(stretched(tiny_llama()), **FIELDS | {"row_scale": True})).values():
        W, index, c = (
            layer.get_base_weight(),
            layer.idlora_adapter["default"].index,
            layer.idlora_adapter["default"].row_scale,
        )
        assert c.dtype == torch.float32
        torch.testing.assert_close(c, reference.row_scale(W, index), rtol=1e-6, atol=0)
        norms = (c[..., None] * W[index.long()]).norm(dim=-1)
        torch.testing.assert_close(norms[norms > 0], norms.max().expand(int((norms > 0).sum())))
        n = torch.randn(1, 8, generator=torch.Generator().manual_seed(seed_of(layer)))  # the linear router's start
        torch.testing.assert_close(layer.idlora_adapter["default"].router, n / (norms.mean(0, keepdim=True) * 16**0.5))


def test_rows_of_zeros_and_of_rounding_errors_have_no_direction():
    W = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    W[1], W[4] = 0, 1e-9 * W[4]
    c = row_scale(W, torch.arange(8).view(2, 4))
    assert (c == 0).flatten().tolist() == [False, True, False, False, True, False, False, False]
    torch.testing.assert_close(row_scale(1e-3 * W, torch.arange(8).view(2, 4)), c)  # x scales with W
    assert row_scale(torch.zeros(8, 5), torch.arange(4).view(2, 2)).count_nonzero() == 0
    assert torch.equal(row_scale(W.to("meta"), torch.arange(4).view(2, 2)), torch.ones(2, 2))


def test_the_default_is_one_of_the_variants():
    config = IdLoraConfig()
    assert {name: getattr(config, name) for name in VARIANTS[DEFAULT]} == VARIANTS[DEFAULT]


def test_the_paper_stays_one_argument_away():
    paper = {"r": 128, "num_clusters": 4, "rank_boost": 2, "scaling": 1.0}
    paper |= {"router": "linear", "shared_router": True, "selection": "nearest", "row_scale": False}
    config = IdLoraConfig(preset="paper")
    assert {name: getattr(config, name) for name in paper} == paper
    assert "preset" not in config.to_dict()
    smaller = IdLoraConfig(preset="paper", r=32, num_clusters=2, router="linear", seed=3)
    assert (smaller.r, smaller.num_clusters, smaller.rank_boost, smaller.seed) == (32, 2, 2, 3)
    assert copy.deepcopy(smaller) == smaller == dataclasses.replace(smaller, preset="paper")
    for name, value in {"router": "static", "shared_router": False, "selection": "random", "row_scale": True}.items():
        with pytest.raises(ValueError, match=f"preset='paper' means {name}={paper[name]!r}, got {value!r}"):
            IdLoraConfig(preset="paper", **{name: value})
    with pytest.raises(ValueError, match="preset must be one of paper, got 'best'"):
        IdLoraConfig(preset="best")
    with pytest.raises(ValueError, match="row_scale must be True or False, got 'median'"):
        IdLoraConfig(row_scale="median")
    with pytest.raises(ValueError, match=r"shared_router must be True with router='bounded', .* got False"):
        IdLoraConfig(router="bounded", shared_router=False)
    model = idlora_ext.apply(tiny_llama(), preset="paper", r=8, num_clusters=2)
    assert {layer.idlora_adapter["default"].router.shape for layer in layers_of(model).values()} == {(1, 8)}
    assert torch.equal(logits(model), logits(tiny_llama()))


def test_the_preset_does_not_follow_the_defaults(monkeypatch):
    """As if the defaults had become others."""
    fields_alone = IdLoraConfig.__init__.__wrapped__
    defaults = list(fields_alone.__defaults__)
    names = [f.name for f in dataclasses.fields(IdLoraConfig) if f.init]
    for name, value in {"router": "static", "selection": "random", "row_scale": True, "r": 16}.items():
        defaults[names.index(name)] = value
    monkeypatch.setattr(fields_alone, "__defaults__", tuple(defaults))
    assert IdLoraConfig().router == "static"
    config = IdLoraConfig(preset="paper")
    assert (config.router, config.selection, config.row_scale, config.r) == ("linear", "nearest", False, 128)
    with pytest.raises(ValueError, match="preset='paper' means router='linear', got 'static'"):
        IdLoraConfig(preset="paper", router="static")
