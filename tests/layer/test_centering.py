"""``center``: the mean that is taken out of the products with the rows, when it is taken, saved, merged and exported."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import idlora_ext
from idlora_ext import IdLoraConfig
from idlora_ext.layer.adapter import BaseOutput
from idlora_ext.layer.centering import mean_over_tokens
from tests.helpers.commands import read_in_plain_peft
from tests.helpers.models import (
    CLOSE,
    FIELDS,
    MODELS,
    PLAIN,
    assert_unchanged,
    inputs,
    layers_of,
    logits,
    randomize_adapter,
    tiny_gpt2,
    tiny_llama,
    tiny_moe,
    weights,
)

CENTERED = FIELDS | {"router": "static", "center": True}
FILE = "adapter_model.safetensors"


def adapted(kind="llama", **fields):
    return idlora_ext.apply(MODELS[kind].make().double(), **MODELS[kind].fields(**CENTERED), **fields)


def calibrated(kind="llama", **fields):
    """An adapter with a mean and values for B, as after training."""
    model = get_peft_model(MODELS[kind].make().double(), IdLoraConfig(**MODELS[kind].fields(**CENTERED) | fields))
    idlora_ext.calibrate(model, [inputs()], progress=False)
    return randomize_adapter(model, std=0.2).eval()


def means_of(model):
    return {name: layer.idlora_adapter["default"].mean.clone() for name, layer in layers_of(model).items()}


def outputs(model, *batches, gradients=False):
    """What each base layer returns, by name, over all tokens: the reference for a mean."""
    found = {}
    hooks = [
        layer.base_layer.register_forward_hook(
            lambda _, __, y0, name=name: found.setdefault(name, []).append(y0.flatten(0, -2))
        )
        for name, layer in layers_of(model).items()
    ]
    with torch.set_grad_enabled(gradients):
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])  # many a loop never calls train()
@pytest.mark.parametrize("kind", PLAIN)
def test_the_first_batch_of_training_gives_the_mean_and_no_other(kind, train):
    model = adapted(kind)
    before = logits(model)
    assert not any(mean.any() for mean in means_of(model).values())  # evaluation before training takes none
    expected = {name: y0.mean(0) for name, y0 in outputs(model.train(train), inputs(), gradients=True).items()}
    taken = means_of(model)
    for name, mean in taken.items():
        torch.testing.assert_close(mean, expected[name], **CLOSE)
    model(**inputs(seed=1))
    assert all(torch.equal(mean, taken[name]) for name, mean in means_of(model).items())
    assert torch.equal(logits(model.eval()), before)  # B is zero still


def test_centred_products_have_no_mean():
    model = adapted()
    model.train()(**inputs())
    for name, y0 in outputs(model, inputs()).items():
        layer = layers_of(model)[name]
        x = layer.idlora_adapter["default"].gather(BaseOutput(y0))
        torch.testing.assert_close(x.mean(0), torch.zeros_like(x[0]), **CLOSE)


def test_calibrate_takes_the_mean_over_all_tokens_that_are_not_masked():
    model = adapted()
    model.model.layers[0].train()
    modes = [module.training for module in model.modules()]
    found = outputs(model, inputs(), padded())
    expected = {name: (y0[:14].sum(0) + y0[14:25].sum(0)) / 25 for name, y0 in found.items()}
    before = logits(model)
    idlora_ext.calibrate(model, [inputs(), padded()], progress=False)
    for name, mean in means_of(model).items():
        torch.testing.assert_close(mean, expected[name], **CLOSE)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(logits(model), before)
    model.train()(**inputs(seed=3))
    for name, mean in means_of(model).items():  # training takes no other
        torch.testing.assert_close(mean, expected[name], **CLOSE)


def padded(seed=1):
    """Rows of 7 and of 4 tokens."""
    batch = inputs(seed=seed)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, 4:] = 0
    return batch


def means_without_padding(model, batch):
    kept = batch["attention_mask"].flatten().bool()
    return {name: (y0[kept] if len(y0) == len(kept) else y0).mean(0) for name, y0 in outputs(model, batch).items()}


@pytest.mark.parametrize("door", ["apply", "peft", "transformers"])
@pytest.mark.parametrize("kind", PLAIN)
def test_tokens_that_pad_the_first_batch_do_not_count(kind, door):
    model, fields = MODELS[kind].make().double(), MODELS[kind].fields(**CENTERED)
    if door == "apply":
        called = idlora_ext.apply(model, **fields)
    elif door == "peft":
        called = get_peft_model(model, IdLoraConfig(**fields))
    else:
        called = model
        model.add_adapter(IdLoraConfig(**fields))
    expected = means_without_padding(model, padded())
    called.eval()(**padded())
    for name, mean in means_of(model).items():
        torch.testing.assert_close(mean, expected[name], **CLOSE)
    assert not any(vars(layer).get("padding_mask") is not None for layer in layers_of(model).values())
    base = idlora_ext.remove(called)
    assert not base._forward_pre_hooks
    assert not [name for name in vars(base) if "idlora" in name]


def test_padding_of_a_mask_that_is_given_by_position_or_has_another_form():
    one, other = adapted(), adapted()
    batch = padded()
    expected = means_without_padding(one, batch)
    one(batch["input_ids"], batch["attention_mask"])
    for name, mean in means_of(one).items():
        torch.testing.assert_close(mean, expected[name], **CLOSE)
    every = {name: y0.mean(0) for name, y0 in outputs(other, inputs(seed=1)).items()}
    other(**inputs(seed=1), attention_mask=torch.ones(2, 1, 7, 7, dtype=torch.bool).tril())
    for name, mean in means_of(other).items():
        torch.testing.assert_close(mean, every[name], **CLOSE)


def test_padding_that_is_not_finite():
    y0 = torch.tensor([[[1.0], [3.0], [torch.nan]], [[5.0], [torch.inf], [torch.nan]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert mean_over_tokens(y0, None, 1, mask).tolist() == [3.0]
    assert mean_over_tokens(y0, None, 1, torch.zeros_like(mask)).tolist() == [0.0]


def test_calibrate_refuses_and_changes_nothing():
    model = adapted()
    with pytest.raises(ValueError, match="at least one batch is needed"):
        idlora_ext.calibrate(model, [], progress=False)
    with pytest.raises(ValueError, match="no ID-LoRA adapter 'other' with center=True"):
        idlora_ext.calibrate(model, [inputs()], "other")
    with pytest.raises(ValueError, match="no ID-LoRA adapter 'default' with center=True"):
        idlora_ext.calibrate(idlora_ext.apply(tiny_llama(), **FIELDS | {"center": False}), [inputs()])
    randomize_adapter(model)
    with pytest.raises(ValueError, match=r"trained already.*layers.\{0-1\}.mlp.down_proj"):
        idlora_ext.calibrate(model, [inputs()])
    broken = adapted()
    with pytest.raises(IndexError):
        idlora_ext.calibrate(broken, [inputs(), {"input_ids": torch.tensor([[1000]])}], progress=False)
    for untouched in (model, broken):
        assert not any(mean.any() for mean in means_of(untouched).values())
        assert not any(layer.base_layer._forward_hooks for layer in layers_of(untouched).values())


def test_experts_that_no_token_reaches():
    model = idlora_ext.apply(tiny_moe(), **CENTERED)
    one = {"input_ids": torch.tensor([[5]])}
    with pytest.warns(UserWarning, match=r"no token reached these layers, which are not centred: .*experts"):
        idlora_ext.calibrate(copy.deepcopy(model), [one], progress=False)
    model.train()(**one)
    reached = {name for name, mean in means_of(model).items() if mean.any()}
    model(**inputs())  # training reaches others, which then take theirs
    assert reached < {name for name, mean in means_of(model).items() if mean.any()}
    with pytest.raises(ValueError, match="fused experts without one have no place for it"):
        next(m for n, m in layers_of(model).items() if "experts" in n).merge()


@pytest.mark.parametrize("trained", [False, True])
def test_saved_before_training_it_is_still_to_be_taken(tmp_path, trained):
    model = adapted()
    if trained:
        model.train()(**inputs())
        randomize_adapter(model)
    idlora_ext.save(model, tmp_path)
    again = idlora_ext.load(tiny_llama().double(), tmp_path, is_trainable=True)
    assert torch.equal(logits(again.eval()), logits(model.eval()))
    again.train()(**inputs(seed=5))
    same = [torch.equal(mean, means_of(model)[name]) for name, mean in means_of(again).items()]
    assert all(same) if trained else not any(same)
    assert torch.equal(logits(again.eval()), logits(model.eval()))
    tensors = load_file(tmp_path / FILE)
    name = next(name for name in tensors if name.endswith("idlora_adapter.mean"))
    save_file(tensors | {name: tensors[name] + torch.inf}, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"idlora_adapter\.mean: entries must be finite"):
        idlora_ext.load(tiny_llama().double(), tmp_path)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", PLAIN)
def test_merging_gives_a_bias_and_unmerging_takes_it_away(kind, shared):
    model = calibrated(kind, shared_router=shared, row_scale=shared, scaling=0.7)
    base, expected, before = logits(MODELS[kind].make().double()), logits(model), weights(model)
    assert (expected - base).abs().max() > 1e-4
    gaining = [name for name, layer in layers_of(model).items() if layer.bias is None]
    if gaining:
        with pytest.warns(UserWarning, match=f"{len(gaining)} layers get a bias, .*config.attention_bias"):
            model.merge_adapter(safe_merge=True)
    else:
        model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    assert all(layer.base_layer.bias is not None for layer in layers_of(model).values())
    model.unmerge_adapter()
    assert_unchanged(model, before)
    assert weights(model).keys() == before.keys()
    assert torch.equal(logits(model), expected)
    merged = model.merge_and_unload()
    assert type(merged) is type(MODELS[kind].make())
    torch.testing.assert_close(logits(merged), expected, **CLOSE)


def test_without_a_mean_merging_gives_no_bias(recwarn):
    model = randomize_adapter(get_peft_model(tiny_llama().double(), IdLoraConfig(**CENTERED)), std=0.2).eval()
    expected = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, **CLOSE)
    assert merged.state_dict().keys() == tiny_llama().state_dict().keys()
    assert not [warning for warning in recwarn if "get a bias" in str(warning.message)]


def test_a_merged_llama_loads_again_as_the_warning_says(tmp_path):
    model = calibrated()
    expected = logits(model)
    merged = model.merge_and_unload()
    merged.config.attention_bias = merged.config.mlp_bias = True
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(logits(again), expected, **CLOSE)


def test_several_centred_adapters_merge_and_take_part_in_sums_and_mixed_batches():
    model = get_peft_model(MODELS["qwen2"].make().double(), IdLoraConfig(**CENTERED), "static")
    model.add_adapter("linear", IdLoraConfig(**FIELDS | {"router": "linear", "center": True}, seed=3))
    model.add_adapter("plain", IdLoraConfig(**FIELDS | {"router": "static", "center": False}, seed=4))
    names = ["static", "linear", "plain"]
    for name in names:
        if name != "plain":
            model.set_adapter(name)
            idlora_ext.calibrate(model, [inputs(seed=len(name))], name, progress=False)
        randomize_adapter(model, name, std=0.1)
    model.eval()
    ids = inputs(batch=4)["input_ids"]
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=["static", "plain", "__base__", "linear"]).logits
        for row, name in ((0, "static"), (1, "plain"), (3, "linear")):
            model.set_adapter(name)
            torch.testing.assert_close(mixed[row], model(input_ids=ids[row : row + 1]).logits[0], **CLOSE)
        with model.disable_adapter():
            torch.testing.assert_close(mixed[2], model(input_ids=ids[2:3]).logits[0], **CLOSE)
    layer = next(iter(layers_of(model).values()))
    h = torch.randn(4, layer.in_features, dtype=torch.float64)
    updates = 0
    for active in (*names, names):
        model.base_model.set_adapter(active)
        if isinstance(active, str):
            updates = updates + layer(h) - layer.base_layer(h)
    torch.testing.assert_close(layer(h), layer.base_layer(h) + updates, **CLOSE)
    model.base_model.set_adapter(["static", "plain"])
    expected = logits(model)
    model.merge_adapter(["static"])
    model.merge_adapter(["plain"])
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    idlora_ext.remove(model, "static")
    assert [name for name, held in layer.idlora_adapter.items() if held.mean is not None] == ["linear"]
    assert layer.centered
    original = MODELS["qwen2"].make().double()
    for name, layer in layers_of(model).items():
        ours, theirs = layer.base_layer.state_dict(), original.get_submodule(name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.subprocess
def test_plain_peft_reproduces_the_model(tmp_path):
    expected, jobs = {}, []
    for kind in ("llama", "gpt2", "qwen2"):
        model, base, lora = calibrated(kind), tmp_path / f"{kind}-base", str(tmp_path / kind)
        plain = MODELS[kind].make().double()
        plain.save_pretrained(base)
        torch.save(inputs()["input_ids"], base / "ids.pt")
        expected[lora] = logits(model)
        idlora_ext.to_lora(model, lora)
        jobs.append(f"{type(plain).__name__}={base}={lora}")
        assert not next(iter(layers_of(model).values())).supports_lora_conversion()  # PEFT's has no bias
    found = read_in_plain_peft(str(tmp_path / "logits.safetensors"), jobs)
    for lora, values in expected.items():
        torch.testing.assert_close(found[lora], values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_computes_the_same(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = adapted().train()  # B is zero, or no mean would be taken
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        expected = means_without_padding(copy.deepcopy(model), padded())
        model(**padded(), labels=inputs()["input_ids"]).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad} | means_of(model))
        for name, mean in means_of(model).items():
            torch.testing.assert_close(mean, expected[name], **CLOSE)
    assert all(mean.any() for mean in means_of(model).values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, **CLOSE)


@pytest.mark.compiled
def test_compiled_training_takes_the_mean():
    model, plain = (idlora_ext.apply(tiny_llama(num_hidden_layers=1).double(), **CENTERED).train() for _ in range(2))
    model.config.use_cache = plain.config.use_cache = False
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for seed in (0, 1):
        for one in (compiled, plain):
            one(**padded(seed), labels=inputs(seed=seed)["input_ids"]).loss.backward()
    for name, mean in means_of(plain).items():
        torch.testing.assert_close(means_of(model)[name], mean, **CLOSE)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        if theirs.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, **CLOSE)


def test_a_model_in_low_precision_and_buffers_that_are_cast(tmp_path):
    model = idlora_ext.apply(tiny_gpt2().bfloat16(), **CENTERED)
    model.train()(**inputs(), labels=inputs()["input_ids"]).loss.backward()
    assert {mean.dtype for mean in means_of(model).values()} == {torch.float32}
    randomize_adapter(model).eval()
    expected = logits(model)
    idlora_ext.save(model, tmp_path)
    assert torch.equal(logits(idlora_ext.load(tiny_gpt2().bfloat16(), tmp_path)), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_gpt2().bfloat16(), tmp_path)), expected)
    rounded = model.to(torch.bfloat16).float()  # a mean that was rounded, beside float32 activations
    torch.testing.assert_close(logits(rounded), expected.float(), rtol=0, atol=0.02 * float(expected.abs().max()))


def test_empty_input_takes_no_mean():
    layer = idlora_ext.apply(nn.Sequential(nn.Linear(8, 16)), **CENTERED, target_modules=["0"], progress=False)[0]
    layer.train()(torch.zeros(0, 8))
    assert not layer.idlora_adapter["default"].mean_taken
    layer(torch.ones(3, 8))
    assert layer.idlora_adapter["default"].mean_taken
