"""Quantised base layers: real quantisers where they are installed, and stand-ins for those that need a GPU."""

from __future__ import annotations

import zlib
from unittest import mock

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM

import idlora_ext
from idlora_ext import IdLoraConfig, reference
from idlora_ext.base import weight
from idlora_ext.layer.layer import IdLoraLayer
from idlora_ext.rows.selection import select_rows
from tests.helpers.models import layers_of, logits, modules_of, randomize_adapter, tiny_llama

SIZES = {"r": 8, "num_clusters": 4}
FIELDS = SIZES | {"router": "linear", "selection": "nearest", "row_scale": False, "center": False}
WIDE = {"hidden_size": 128, "intermediate_size": 256, "attention_bias": True, "mlp_bias": True}


class StandIn(nn.Module):
    """What GPTQ and AWQ layers show: sizes, a packed ``qweight`` of odd shape, a bias inside, no ``weight``."""

    def __init__(self, linear: nn.Linear, along: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        W = linear.weight.detach()
        scales = W.abs().amax(1) / 7  # one for each output
        nibbles = ((W / scales[:, None]).round() + 8).int().T  # [d_in, d]
        self.along = along  # GPTQ packs along d_in, AWQ along d
        parts = nibbles.unflatten(along, (-1, 8)).movedim(along + 1, -1)
        packed = (parts.long() << (4 * torch.arange(8))).sum(-1)
        self.register_buffer("qweight", packed.to(torch.int32))  # values above 2^31 wrap round
        self.register_buffer("scales", scales[None])
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, h):
        nibbles = (self.qweight[..., None] >> (4 * torch.arange(8))) & 15
        W = (nibbles.movedim(-1, self.along + 1).flatten(self.along, self.along + 1) - 8) * self.scales
        y = h @ W.to(h.dtype)
        return y if self.bias is None else y + self.bias.to(h.dtype)


class PackedLinear(nn.Linear):
    """A quantised layer that is an ``nn.Linear``, such as FP8Linear: its ``weight`` is not ``W``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        packed = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias

    def forward(self, h):
        return nn.functional.linear(h, (self.weight * self.scale).to(h.dtype), self.bias)


def hqq(linear):
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=64)
    return HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device="cpu")


def by_transformers(config):
    def quantise(model, directory):
        model.save_pretrained(directory)
        return AutoModelForCausalLM.from_pretrained(directory, quantization_config=config(), device_map="cpu").eval()

    return quantise


def layer_by_layer(make):
    def quantise(model, directory):
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name != "lm_head":
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, make(module))
        return model

    return quantise


def bitsandbytes(**fields):
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**fields)


def torchao(bits):
    from torchao import quantization
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    int4 = {"weight_dtype": torch.int4, "granularity": PerGroup(32)}
    return TorchAoConfig(
        quantization.Int8WeightOnlyConfig() if bits == 8 else quantization.IntxWeightOnlyConfig(**int4)
    )


QUANTISERS = {  # name: (library, how)
    "bitsandbytes-8": ("bitsandbytes", by_transformers(lambda: bitsandbytes(load_in_8bit=True))),
    "bitsandbytes-4": ("bitsandbytes", by_transformers(lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"))),
    "torchao-8": ("torchao", by_transformers(lambda: torchao(8))),
    "torchao-4": ("torchao", by_transformers(lambda: torchao(4))),
    "hqq-4": ("hqq", layer_by_layer(hqq)),
    "gptq-stand-in": (None, layer_by_layer(lambda linear: StandIn(linear, 0))),
    "awq-stand-in": (None, layer_by_layer(lambda linear: StandIn(linear, 1))),
    "packed-stand-in": (None, layer_by_layer(PackedLinear)),
}  # fmt: skip


def original(seed=0):
    model = tiny_llama(seed, **WIDE)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers starts them at zero
            nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture(params=QUANTISERS)
def quantised(request, tmp_path):
    """A function that makes a quantised tiny Llama."""
    library, quantise = QUANTISERS[request.param]
    if library:
        pytest.importorskip(library)

    return lambda seed=0: quantise(original(seed), tmp_path / f"base-{seed}")


def test_merging_is_refused_and_export_reads_the_dequantised_rows(quantised):
    model = randomize_adapter(
        get_peft_model(quantised(), IdLoraConfig(**FIELDS | {"router": "static"})), std=0.3
    ).eval()
    before = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"layer 'model.* cannot be merged: W is quantised.*full precision"):
            merge()
        assert torch.equal(logits(model), before)
    for layer in layers_of(model).values():
        update = layer.get_delta_weight("default")
        h = torch.randn(5, layer.in_features, dtype=torch.float32)
        with torch.no_grad():
            difference = layer(h) - layer.base_layer(h) - h @ update.T
        assert difference.norm() < 0.05 * (h @ update.T).norm()  # 8-bit layers round their input too


def test_layers_are_base_output_and_adapter_on_it_alone(quantised):
    """The base layer is called as it is, bias and all; its weights are read once for each layer and never again."""
    model = quantised()
    for layer in model.modules():
        layer.support_avx512bf16_for_cpu = False  # bitsandbytes: see test_weights_packed_for_inference
    before = logits(model)
    kept = modules_of(model)
    with mock.patch("idlora_ext.layer.layer.base_weight", side_effect=weight.base_weight) as read:
        idlora_ext.apply(model, **FIELDS)
        layers = layers_of(model)
        assert len(layers) == 14, "all-linear must take in every quantised layer, and not the head"
        assert read.call_count == len(layers)
        randomize_adapter(model, std=0.3)
        model.train()(input_ids=torch.arange(10)[None], labels=torch.arange(10)[None]).loss.backward()
        model.eval()
        assert read.call_count == len(layers)
    for layer in layers.values():
        index, router, B = (getattr(layer.idlora_adapter["default"], n) for n in ("index", "router", "B"))
        assert router.dtype == B.dtype == torch.float32
        h = torch.randn(5, layer.in_features)
        y0 = layer.base_layer(h)
        y = layer(h)
        assert y.dtype == y0.dtype
        expected = reference.adapt(
            *(t.double() for t in (y0 - layer.bias,)), index, router.double(), B.double(), layer.bias.double()
        )
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
        assert (y - y0).abs().max() > 1e-2
    idlora_ext.remove(model)
    assert modules_of(model) == kept
    assert torch.equal(logits(model), before)


def test_rows_are_chosen_from_the_dequantised_weights(quantised):
    model = idlora_ext.apply(quantised(), **FIELDS)
    exact = original()
    for name, layer in layers_of(model).items():
        W = layer.get_base_weight()
        assert W.shape == (layer.out_features, layer.in_features)
        true = exact.get_submodule(name).weight
        assert (W - true).norm() < 0.25 * true.norm()
        seed = zlib.crc32(name.encode(), 0)
        assert torch.equal(select_rows(W, 4, 8, seed=seed), layer.idlora_adapter["default"].index)
        # what any layer that returns h W^T + b can be asked; bitsandbytes' 8 bits quantise the unit vectors too
        through = weight.read_through(layer.get_base_layer())
        torch.testing.assert_close(through, W.float(), rtol=1e-2, atol=2e-3)


DOORS = [(name, ("apply", "peft")[i % 2]) for i, name in enumerate(QUANTISERS)]


@pytest.mark.parametrize(("quantised", "door"), DOORS, indirect=["quantised"])
def test_train_save_load(quantised, tmp_path, door):
    model = quantised()
    base = {n: p.detach().clone() for n, p in model.named_parameters() if "idlora" not in n and p.ndim == 1}
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = idlora_ext.apply(model, **SIZES) if door == "apply" else get_peft_model(model, IdLoraConfig(**SIZES))
    ids = torch.randint(0, 101, (4, 12), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1, losses
    inner = model.get_base_model() if door == "peft" else model
    now = dict(inner.named_parameters())
    assert all(torch.equal(value, now[n]) for n, value in base.items() if n in now)
    model.eval()
    trained = logits(model)
    directory = tmp_path / "adapter"
    model.save_pretrained(directory) if door == "peft" else idlora_ext.save(model, directory)
    with mock.patch("idlora_ext.layer.layer.base_weight", side_effect=weight.base_weight) as read:
        if door == "peft":
            again = PeftModel.from_pretrained(quantised(), directory)
        else:
            again = idlora_ext.load(quantised(), directory)
    assert read.call_count == 14  # for the fingerprints
    torch.testing.assert_close(logits(again), trained)
    if door == "peft":
        unloaded = again.unload()
        assert not any(isinstance(module, IdLoraLayer) for module in unloaded.modules())
        torch.testing.assert_close(logits(unloaded), logits(quantised()))


def test_an_adapter_moves_between_precisions_of_one_base_and_to_no_other(quantised, tmp_path):
    """The fingerprint of 8 or 4 bits may differ by a quarter; other weights differ by more than their own size."""
    for name, make, other in (("16", lambda: original().bfloat16(), quantised), ("q", quantised, lambda: original().bfloat16())):  # fmt: skip
        directory = tmp_path / name
        idlora_ext.save(randomize_adapter(idlora_ext.apply(make(), **FIELDS)), directory)
        loaded = idlora_ext.load(other(), directory)
        assert not torch.equal(logits(loaded), logits(other()))
    stranger = quantised(1)
    before = modules_of(stranger)
    with pytest.raises(ValueError, match="made from another base model; the first layer that differs"):
        idlora_ext.load(stranger, tmp_path / "16")
    with pytest.raises(ValueError, match="made from another base model"):
        idlora_ext.load(original(1), tmp_path / "q")
    assert modules_of(stranger) == before


def test_bfloat16_activations(quantised):
    """An epilogue in the dtype of the base output, float32 parameters."""
    model = quantised()
    layers = layers_of(randomize_adapter(idlora_ext.apply(model, **FIELDS)))
    for layer in layers.values():
        h = torch.randn(3, layer.in_features, dtype=torch.bfloat16)
        try:
            y0 = layer.get_base_layer()(h)
        except RuntimeError:
            pytest.skip("this base layer computes in the dtype it was made with, and nothing else")
        y = layer(h)
        assert y.dtype == y0.dtype
        assert not torch.equal(y, y0)
        alpha = layer.alpha(h)
        assert alpha.shape == (3, 4)


def test_what_is_no_linear_layer_is_still_refused():
    class Odd(nn.Module):
        in_features, out_features = 64, 64

        def forward(self, h):
            return h

    model = nn.Sequential(Odd())
    with pytest.raises(ValueError, match=r"cannot be adapted: 0 \(.*Odd\)"):
        idlora_ext.apply(model, target_modules=["0"], **FIELDS)


def test_summary_counts_what_packed_weights_stand_for(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = idlora_ext.apply(QUANTISERS["bitsandbytes-4"][1](original(), tmp_path), **FIELDS)
    expected = idlora_ext.summary(idlora_ext.apply(original(), **FIELDS))
    assert idlora_ext.summary(model).total_parameters == expected.total_parameters


def test_weights_packed_for_inference(tmp_path):
    """On CPUs with AVX512-BF16 bitsandbytes packs 4-bit weights in the first evaluation: read right, and not trained."""
    bnb = pytest.importorskip("bitsandbytes")
    _, quantise = QUANTISERS["bitsandbytes-4"]
    model = quantise(original(), tmp_path / "base")
    fresh = {n: m.support_avx512bf16_for_cpu for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    if not all(fresh.values()):
        pytest.skip("this CPU has no AVX512-BF16")
    logits(model)
    assert all(model.get_submodule(n).weight.quant_state.packing_format_for_cpu for n in fresh)
    exact = original()
    layers = layers_of(idlora_ext.apply(model, **FIELDS))
    for name, layer in layers.items():
        true = exact.get_submodule(name).weight
        assert (layer.get_base_weight() - true).norm() < 0.25 * true.norm()
    logits(model)
    with pytest.raises(ValueError, match=r"layer .* bitsandbytes has packed its 4-bit weights for inference"):
        model.train()(input_ids=torch.arange(10)[None])


def write_gguf(model, path):
    gguf = pytest.importorskip("gguf")
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        layer, _, kind = name.rpartition(".")
        dtype = gguf.GGMLQuantizationType.Q8_0 if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(
            f"{names.get_name(layer)}.{kind}", gguf.quants.quantize(tensor.numpy(), dtype), raw_dtype=dtype
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_loaded_from_gguf(tmp_path):
    """transformers dequantises such a model as it loads it: plain layers, which can also be merged."""
    write_gguf(tiny_llama(max_position_embeddings=128), tmp_path / "model.gguf")

    def base():
        return AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()

    untouched = logits(base())
    model = get_peft_model(base(), IdLoraConfig(**SIZES))
    assert torch.equal(logits(model.eval()), untouched)
    ids = torch.arange(20)[None]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(layer.idlora_adapter["default"].B.grad.any() for layer in layers_of(model).values())
    expected = logits(randomize_adapter(model, std=0.3).eval())
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), expected)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), expected)
