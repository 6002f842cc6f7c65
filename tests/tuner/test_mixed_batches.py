"""Mixed batches: every row with an adapter of its own, by PEFT's ``adapter_names`` and by our context manager."""

from __future__ import annotations

import contextlib
import copy
from unittest import mock

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.overrides import TorchFunctionMode

import idlora_ext
from idlora_ext import IdLoraConfig, ops
from idlora_ext.layer.mixed_rows import Groups
from tests.helpers.models import FIELDS, MODELS, PLAIN, Invariant, layers_of, randomize_adapter, tiny_bert, tiny_llama
from tests.helpers.problems import every_pair, named

NATIVE = idlora_ext.native.module is not None  # in plain PyTorch, products with B depend on the number of tokens
NAMES = ["fr", "__base__", "de", "it", "fr", "de"]
ADAPTERS = {  # ranks, clusters, routers and targets differ
    "de": {"r": 8, "num_clusters": 2, "seed": 1},
    "fr": {"r": 4, "num_clusters": 3, "seed": 2, "shared_router": False, "scaling": 0.5},
    "it": {"r": 8, "num_clusters": 2, "seed": 3, "rank_boost": 1, "layers_to_transform": [0], "selection": "random"},
}


STRENGTH = {"llama": 0.2, "qwen2": 0.2, "gpt2": 4.0, "bert": 16.0}  # of B, so that an adapter shows in bfloat16


def adapted(kind="llama", door="peft", dtype=torch.float32):
    model = MODELS[kind].make().to(dtype)
    for name, fields in ADAPTERS.items():
        config = IdLoraConfig(**MODELS[kind].fields(**fields))
        if door == "apply":
            idlora_ext.apply(model, config, adapter_name=name)
        elif isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name)
    for seed, name in enumerate(ADAPTERS):
        randomize_adapter(model, name, std=STRENGTH[kind], seed=seed)
    return model.eval()


@contextlib.contextmanager
def only(model, name):
    """The model with one adapter, or with none."""
    if name == "__base__":
        for layer in layers_of(model).values():
            layer.enable_adapters(False)
        yield
        for layer in layers_of(model).values():
            layer.enable_adapters(True)
    else:
        for layer in layers_of(model).values():
            layer.set_adapter(name)
        yield


def run(model, names, **batch):
    if isinstance(model, PeftModel):
        return model(**batch, adapter_names=names)
    with idlora_ext.adapter_names(model, names):
        return model(**batch)


def ids(rows=6, length=7):
    return torch.randint(1, 101, (rows, length), generator=torch.Generator().manual_seed(0))


class TorchCalls(TorchFunctionMode):
    """Counts calls of one function of torch from Python."""

    def __init__(self, name):
        super().__init__()
        self.name, self.count = name, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function.__name__ == self.name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_rows_of_a_layer_are_bit_equal_to_running_them_without_the_others(dtype, bias):
    torch.manual_seed(0)
    model = nn.Sequential(Invariant(48, 64, bias=bias)).to(dtype)
    for name, fields in ADAPTERS.items():
        fields = {k: v for k, v in fields.items() if k != "layers_to_transform"} | {"target_modules": ["0"]}
        idlora_ext.apply(model, adapter_name=name, **fields)
        randomize_adapter(model, name, std=0.2)
    model[0].idlora_adapter["de"].B.data = (
        model[0].idlora_adapter["de"].B.data.to(dtype)
    )  # "fr", "it" stay float32 for 16-bit models
    model.eval()
    h = torch.randn(len(NAMES), 5, 48).to(dtype)
    with idlora_ext.adapter_names(model, NAMES):
        y = model(h)
    assert y.dtype == dtype
    for row, name in enumerate(NAMES):
        same = [n for n, other in enumerate(NAMES) if other == name]
        with only(model, name):
            assert torch.equal(y[same], model(h[same])), name
            if NATIVE and dtype != torch.float64:
                assert torch.equal(y[row], model(h[row : row + 1])[0]), (row, name)
    assert len({tuple(row.flatten().tolist()) for row in y}) == len(NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_plain_layers_are_bit_equal_to_running_their_adapter_on_the_whole_batch(dtype):
    """The same products on the same batch: here nothing at all may differ, base rows with a bias included."""
    for kind in ("gpt2", "qwen2"):
        model = adapted(kind, dtype=dtype)
        for layer in layers_of(model).values():
            h = torch.randn(len(NAMES), 3, layer.in_features).to(dtype)
            with idlora_ext.adapter_names(model, NAMES):
                y = layer(h)
            for row, name in enumerate(NAMES):
                with only(layer, name):
                    expected = layer(h)[row]
                    if name not in layer.idlora_adapter and layer.bias is not None:
                        expected = layer.base_layer(h[row : row + 1])[0]  # the bias is added in the product
                    if NATIVE or name not in layer.idlora_adapter:
                        assert torch.equal(y[row], expected), (row, name)
                    else:
                        torch.testing.assert_close(y[row], expected)


@every_pair(kind=named(PLAIN), door=named(["peft", "apply"]), dtype=named([torch.float32, torch.bfloat16]))
@torch.no_grad()
def test_rows_of_a_model_are_those_of_running_them_alone(kind, door, dtype):
    model = adapted(kind, door, dtype)
    batch = ids()
    noise = 0.0  # by how much the model differs between a batch and its rows: adapters amplify what the base differs by
    for name in sorted(set(NAMES)):
        with only(model, name):
            whole = model(batch).logits
            rows = torch.cat([model(batch[n : n + 1]).logits for n in range(len(batch))])
        noise = max(noise, float((rows - whole).abs().max()))
    with only(model, "__base__"):
        whole = model(batch).logits
    y = run(model, NAMES, input_ids=batch).logits
    tolerance = 2 * max(noise, torch.finfo(dtype).eps * float(y.abs().max()))
    for row, name in enumerate(NAMES):
        with only(model, name):
            alone = model(batch[row : row + 1]).logits[0]
        assert (y[row] - alone).abs().max() <= tolerance, (row, name)
        assert name == "__base__" or (y[row] - whole[row]).abs().max() > tolerance, "the adapter does nothing"


@torch.no_grad()
def test_names_are_not_ignored_and_the_active_adapter_is_left_alone():
    model = adapted()
    batch = ids()
    active = model.active_adapters
    with only(model, "de"):
        before = model(batch).logits
        mixed = model(batch, adapter_names=["fr"] * 6).logits
        assert not torch.allclose(mixed, before)
        assert torch.equal(model(batch).logits, before)
    with only(model, "fr"):
        assert torch.equal(model(batch).logits, mixed)
    assert model.active_adapters == active
    assert all(layer.mixed_batch is None for layer in layers_of(model).values())


def test_rows_are_grouped_once_for_all_layers_and_moved_only_if_they_must_be():
    model = adapted(door="apply")
    batch = ids()
    for names, moves in ((NAMES, 2), (sorted(NAMES), 0), (["fr"] * 6, 0), (["__base__"] * 6, 0)):
        adapting = [layer for layer in layers_of(model).values() if any(name in layer.idlora_adapter for name in names)]
        slices = sum(len({n for n in names if n in layer.idlora_adapter}) for layer in adapting)
        with (
            torch.no_grad(),
            mock.patch.object(Groups, "__init__", autospec=True, side_effect=Groups.__init__) as grouped,
            TorchCalls("index_select") as calls,
            mock.patch.object(ops, "adapt", side_effect=ops.adapt) as adapt,
            idlora_ext.adapter_names(model, names),
        ):
            model(batch)
        assert grouped.call_count <= 2  # the batch, and the batch as generate repeats it
        assert calls.count == moves * len(adapting)
        assert adapt.call_count == slices  # one for every adapter that is present, not one for every row


@pytest.mark.parametrize("beams", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}], ids=str)
@torch.no_grad()
def test_generate(beams):
    model = adapted().double()
    prompts = ids()
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0} | beams
    mixed = model.generate(input_ids=prompts, adapter_names=NAMES, **settings)
    copies = beams.get("num_return_sequences", 1)
    for row, name in enumerate(NAMES):
        with only(model, name):
            alone = model.generate(input_ids=prompts[row : row + 1], **settings)
        assert torch.equal(mixed[row * copies : (row + 1) * copies], alone)
    assert len({tuple(row[7:].tolist()) for row in mixed}) > 2

    inner = model.get_base_model()  # the context manager says the same to a model that knows no adapter_names
    with idlora_ext.adapter_names(inner, NAMES, num_beams=beams.get("num_beams", 1)):
        assert torch.equal(inner.generate(input_ids=prompts, **settings), mixed)


@pytest.mark.parametrize("num_beams", [1, 2])
@torch.no_grad()
def test_generate_with_an_encoder_that_sees_rows_unrepeated(num_beams):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=101, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ).double()
    model = get_peft_model(model, IdLoraConfig(task_type="SEQ_2_SEQ_LM", **FIELDS), adapter_name="de")
    model.add_adapter("fr", IdLoraConfig(task_type="SEQ_2_SEQ_LM", r=4, num_clusters=3))
    for seed, name in enumerate(["de", "fr"]):
        randomize_adapter(model, name, std=0.3, seed=seed)
    model.eval()
    names = ["fr", "__base__", "de", "fr"]
    prompts = ids(rows=4)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": num_beams}
    mixed = model.generate(input_ids=prompts, adapter_names=names, **settings)
    for row, name in enumerate(names):
        with only(model, name):
            assert torch.equal(mixed[row : row + 1], model.generate(input_ids=prompts[row : row + 1], **settings))


def test_gradients_reach_every_adapter_as_if_its_rows_had_been_run_alone():
    """PEFT has mixed batches in evaluation mode only; there gradients flow."""
    model = adapted(door="apply").double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(".B") or name.endswith(".router"))
    batch = ids()
    run(model, NAMES, input_ids=batch).logits.square().sum().backward()
    mixed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for row, name in enumerate(NAMES):
        if name == "__base__":
            continue
        run(model, [name], input_ids=batch[row : row + 1]).logits.square().sum().backward()
    alone = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert mixed.keys() == alone.keys()
    assert {name.split(".")[-2] for name in mixed} == set(ADAPTERS)
    for name in mixed:
        torch.testing.assert_close(mixed[name], alone[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("active", ["de", "fr"])
@torch.no_grad()
def test_modules_to_save(active):
    """Each row has the head of its adapter, the base's where the adapter has none, whichever adapter is active."""
    model = get_peft_model(tiny_bert(), IdLoraConfig(modules_to_save=["classifier"], **FIELDS), adapter_name="de")
    model.add_adapter("fr", IdLoraConfig(target_modules=["query", "value"], **FIELDS))
    model.add_adapter("it", IdLoraConfig(target_modules=["key"], modules_to_save=["classifier"], **FIELDS))
    wrapper = next(m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper))
    for seed, name in enumerate(["de", "fr", "it"]):
        randomize_adapter(model, name, std=0.2, seed=seed)
    for name in ("de", "it"):
        wrapper.modules_to_save[name].weight.normal_()
    model.double().eval()
    batch = ids()
    rows = {}
    for name in ("de", "fr", "it"):
        model.set_adapter(name)
        rows[name] = model(input_ids=batch).logits
    with model.disable_adapter():
        rows["__base__"] = model(input_ids=batch).logits
    model.set_adapter(active)
    before = wrapper.active_adapters
    y = model(input_ids=batch, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(y[row], rows[name][row], rtol=1e-10, atol=1e-10)
    assert wrapper.active_adapters == before
    assert not wrapper._forward_pre_hooks


def test_what_is_refused():
    model = adapted()
    batch, ran = {"input_ids": ids()}, []
    handle = model.get_base_model().get_input_embeddings().register_forward_pre_hook(lambda *_: ran.append(1))
    for names, error, message in (
        (["de"] * 5 + ["es"], ValueError, r"Trying to infer with non-existing adapter\(s\): es\."),
        ("abcabc", TypeError, "must be a list of strings"),
        (
            ["de", "fr"],
            ValueError,
            "Length of `adapter_names` should be the same as the number of inputs, but got 2 and 6",
        ),
    ):
        for call in (
            model,
            model.generate,
            lambda adapter_names, **batch: run(model.get_base_model(), adapter_names, **batch),
            lambda adapter_names, input_ids: run(model, adapter_names, inputs_embeds=torch.randn(*input_ids.shape, 64)),
        ):
            with pytest.raises(error, match=message):
                call(**batch, adapter_names=names)
        assert not ran
    handle.remove()
    with pytest.raises(ValueError, match="in training mode"):
        model.train()(**batch, adapter_names=NAMES)
    model.eval()
    layer = layers_of(model)["model.layers.1.mlp.down_proj"]
    layer.merged_adapters.append("de")
    with pytest.raises(ValueError, match="merged adapters, please call `unmerge_adapter` first"):
        model(**batch, adapter_names=NAMES)
    layer.merged_adapters.clear()
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): de"):
        run(tiny_llama(), ["de"] * 6, **batch)
    assert all(layer.mixed_batch is None for layer in layers_of(model).values())
    model(**batch, adapter_names=NAMES)


def test_disabled_adapters_have_precedence_as_with_lora():
    model = adapted()
    with model.disable_adapter():
        base = model(input_ids=ids()).logits
        assert torch.equal(model(input_ids=ids(), adapter_names=NAMES).logits, base)
    model.base_model.disable_adapter_layers()
    assert torch.equal(model(input_ids=ids(), adapter_names=NAMES).logits, base)
    with idlora_ext.adapter_names(model.get_base_model(), NAMES):
        assert torch.equal(model(input_ids=ids()).logits, base)
        model.base_model.enable_adapter_layers()
        assert not torch.equal(model(input_ids=ids()).logits, base)


def test_the_number_of_names_of_a_model_that_is_none_of_transformers():
    model = idlora_ext.apply(nn.Sequential(nn.ReLU(), nn.Linear(64, 64)), target_modules=["1"], **FIELDS).eval()
    ran = []
    model[0].register_forward_pre_hook(lambda *_: ran.append(1))
    with idlora_ext.adapter_names(model, ["default"] * 3):
        with pytest.raises(ValueError, match="should be the same as the number of inputs, but got 3 and 4"):
            model(torch.randn(4, 64))
        assert not ran
        model(torch.randn(3, 64))


def test_flattened_rows_and_experts_are_refused():
    """Nobody can say whose they are: a router sorts tokens by expert, and other code flattens time first."""
    layer = layers_of(adapted())["model.layers.0.mlp.up_proj"]
    with idlora_ext.adapter_names(layer, NAMES), pytest.raises(ValueError, match="flattened"):
        layer(torch.randn(6 * 7, 64))
    model = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(64, 64)])}).eval()
    idlora_ext.apply(model, target_modules=["0"], **FIELDS)
    with (
        pytest.raises(ValueError, match=r"'experts\.0' sees the tokens routed to it"),
        idlora_ext.adapter_names(model, []),
    ):
        pass


def test_adapters_without_rows_and_layers_of_other_methods_are_refused():
    model = idlora_ext.apply(tiny_llama(), **FIELDS)
    for layer in layers_of(model).values():
        layer.idlora_adapter["default"].pending = True
    with pytest.raises(ValueError, match="never loaded"):
        run(model, ["default"] * 6, input_ids=ids())

    from peft import LoraConfig, inject_adapter_in_model

    model = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), tiny_llama())
    with pytest.raises(ValueError, match="q_proj' has an adapter of another method"):
        run(model, ["default"] * 6, input_ids=ids())


def test_a_model_that_would_ignore_the_keyword_refuses_it_until_the_adapter_is_gone():
    model = tiny_llama()
    assert model(input_ids=ids(), adapter_names=NAMES).logits is not None  # transformers: ignored
    for adapt in (idlora_ext.apply, lambda model, **fields: model.add_adapter(IdLoraConfig(**fields)) or model):
        model = adapt(tiny_llama(), **FIELDS)
        for same in (model, copy.deepcopy(model)):
            with pytest.raises(TypeError, match=r"with idlora_ext\.adapter_names"):
                same(input_ids=ids(), adapter_names=["default"] * 6)
            with pytest.raises(ValueError, match="adapter_names"):
                same.generate(input_ids=ids(), adapter_names=["default"] * 6)
        idlora_ext.apply(model, adapter_name="second", **FIELDS)
        idlora_ext.remove(model, "second")
        assert len(model._forward_pre_hooks) == 2  # none was put on twice
        idlora_ext.remove(model)
        assert not model._forward_pre_hooks
        assert not model._forward_pre_hooks_with_kwargs
    unloaded = get_peft_model(tiny_llama(), IdLoraConfig(**FIELDS)).unload()
    assert not unloaded._forward_pre_hooks
    with pytest.raises(ValueError, match="cannot be adapted"):
        idlora_ext.apply(model, target_modules=["embed_tokens"], **FIELDS)
    assert not model._forward_pre_hooks


def test_contexts_nest():
    model = adapted(door="apply")
    with torch.no_grad(), idlora_ext.adapter_names(model, ["de"] * 6):
        outer = model(ids()).logits
        with idlora_ext.adapter_names(model, ["fr"] * 6):
            assert not torch.equal(model(ids()).logits, outer)
        assert torch.equal(model(ids()).logits, outer)
