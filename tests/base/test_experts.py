"""Mixture-of-experts models: fused 3-D expert parameters, opened or refused, never silently left frozen."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import idlora_ext
from idlora_ext import IdLoraConfig, reference
from idlora_ext.base.experts import ExpertLinear, UnfusedExperts
from tests.helpers.models import FIELDS, inputs, layers_of, logits, randomize_adapter, state_of

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 101,
    "num_experts_per_tok": 2,
    "initializer_range": 0.1,  # wide enough that there is something to learn in a few steps
}


def qwen3_moe(**overrides):
    """Its first layer is dense: ``gate_proj`` and ``up_proj`` exist beside the fused ``gate_up_proj``."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"intermediate_size": 64, "moe_intermediate_size": 32, "num_experts": 4, "mlp_only_layers": [0]}
    return seeded(Qwen3MoeForCausalLM, Qwen3MoeConfig, **(SIZES | sizes | overrides))


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    return seeded(MixtralForCausalLM, MixtralConfig, intermediate_size=32, num_local_experts=4, **SIZES)


def gpt_oss():
    """Transposed weights, biases, gate and up interleaved, a gate of its own."""
    from transformers import GptOssConfig, GptOssForCausalLM

    model = seeded(GptOssForCausalLM, GptOssConfig, intermediate_size=32, num_local_experts=4, **SIZES)
    for name, parameter in model.named_parameters():
        if "bias" in name and "router" not in name:  # or all tokens would go to the same experts
            nn.init.normal_(parameter, std=0.1)
    return model


def nemotron_h():
    """No gate: ``up_proj``, an activation, ``down_proj``."""
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    torch.manual_seed(0)
    config = NemotronHConfig(hidden_size=64, moe_intermediate_size=32, n_routed_experts=4)
    config._experts_implementation = "eager"
    experts = NemotronHExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    return nn.ModuleDict({"experts": experts})


def seeded(model, config, **sizes):
    torch.manual_seed(0)
    return model(config(**sizes)).eval()


MOES = {"qwen3_moe": qwen3_moe, "mixtral": mixtral, "gpt_oss": gpt_oss}


@pytest.fixture(params=MOES)
def kind(request):
    return request.param


def experts_of(model):
    return {n: m for n, m in model.named_modules() if hasattr(m, "num_experts") and hasattr(m, "down_proj")}


def test_every_expert_is_adapted_by_default(kind):
    model = MOES[kind]()
    fused, before = experts_of(model), logits(model)
    assert fused
    layers = layers_of(idlora_ext.apply(model, **FIELDS))
    for name in fused:
        for expert in range(4):
            assert {f"{name}.{expert}.gate_up_proj", f"{name}.{expert}.down_proj"} <= set(layers)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert {f"{name}.base_layer.down_proj" for name in fused} <= frozen


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-cluster"])
@pytest.mark.parametrize("make", [qwen3_moe, mixtral, gpt_oss, nemotron_h])
def test_an_expert_is_the_papers_equation(make, shared):
    """Token by token and expert by expert, each product with its own explicit ``A = W[index]``."""
    model = make()
    idlora_ext.apply(model, shared_router=shared, scaling=0.5, **FIELDS)
    randomize_adapter(model, std=0.3).double()
    experts = next(m for m in model.modules() if isinstance(m, UnfusedExperts))
    base = experts.base_layer
    h = torch.randn(9, 64, dtype=torch.float64)
    chosen = torch.stack([torch.randperm(3)[:2] for _ in h])  # the last expert receives no token
    weights = torch.rand(9, 2, dtype=torch.float64)

    def product(expert, name, h):
        layer = experts.get_submodule(f"{expert}.{name}")
        W = getattr(base, name)[expert]
        bias = getattr(base, name + "_bias")[expert] if base.has_bias else None
        tensors = (getattr(layer.idlora_adapter["default"], n) for n in ("index", "router", "B"))
        return reference.linear(h, W.T if base.is_transposed else W, bias, *tensors, 0.5)

    expected = torch.zeros_like(h)
    for n in range(len(h)):
        for expert, weight in zip(chosen[n].tolist(), weights[n], strict=True):
            first = product(expert, "gate_up_proj" if base.has_gate else "up_proj", h[n : n + 1])
            hidden = base._apply_gate(first) if base.has_gate else base.act_fn(first)
            expected[n] += weight * product(expert, "down_proj", hidden)[0]
    torch.testing.assert_close(experts(h, chosen, weights), expected, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(experts(h, chosen, weights), expected, rtol=1e-9, atol=1e-9)


def test_experts_without_a_token_get_a_gradient_of_zero():
    model = idlora_ext.apply(qwen3_moe(), **FIELDS)
    experts = next(m for m in model.modules() if isinstance(m, UnfusedExperts))
    randomize_adapter(model)
    experts(torch.randn(5, 64), torch.tensor([[0, 2]] * 5), torch.rand(5, 2)).sum().backward()
    sums = {n: p.grad.abs().sum().item() for n, p in experts.named_parameters() if "idlora" in n}
    assert all((total > 0) == name.startswith(("0.", "2.")) for name, total in sums.items())


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_whatever_the_implementation_of_the_experts(implementation):
    model = mixtral()
    model.set_experts_implementation(implementation)
    base = logits(model)
    randomize_adapter(idlora_ext.apply(model, **FIELDS))
    adapted = logits(model)
    assert not torch.allclose(adapted, base)
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    other = mixtral()
    torch.testing.assert_close(logits(randomize_adapter(idlora_ext.apply(other, **FIELDS))), adapted)


def test_trains_saves_and_reloads_by_every_door(kind, tmp_path):
    model = idlora_ext.apply(MOES[kind](), **FIELDS).train()
    batch = inputs(4, 12)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.03
    experts = {n: m for n, m in layers_of(model).items() if ".experts." in n}
    assert all(layer.idlora_adapter["default"].B.abs().sum() > 0 for layer in experts.values())
    trained = logits(model.eval())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(idlora_ext.load(MOES[kind](), tmp_path)), trained)
    loaded = MOES[kind]()
    loaded.load_adapter(tmp_path)
    assert torch.equal(logits(loaded), trained)
    assert torch.equal(logits(PeftModel.from_pretrained(MOES[kind](), tmp_path)), trained)
    assert torch.equal(logits(PeftModel.from_pretrained(MOES[kind](), tmp_path, low_cpu_mem_usage=True)), trained)
    assert torch.equal(logits(copy.deepcopy(model)), trained)


def test_removing_and_unloading_put_the_fused_experts_back(kind):
    model = MOES[kind]()
    before, output = state_of(model), logits(model)
    assert idlora_ext.remove(randomize_adapter(idlora_ext.apply(model, **FIELDS))) is model
    assert state_of(model) == before
    assert torch.equal(logits(model), output)
    peft_model = randomize_adapter(get_peft_model(model, IdLoraConfig(**FIELDS)))
    assert not torch.equal(logits(peft_model), output)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), output)
    unloaded = peft_model.unload()
    assert {n: id(m) for n, m in unloaded.named_modules()} == before[0]
    assert torch.equal(logits(unloaded), output)


def test_several_adapters_share_the_opened_experts():
    model = idlora_ext.apply(mixtral(), adapter_name="a", target_modules=["q_proj"], **FIELDS)
    assert experts_of(model)  # nothing of them is targeted: they stay as they are
    assert not any(isinstance(m, UnfusedExperts) for m in model.modules())
    randomize_adapter(model, "a")
    only_a = logits(model)
    randomize_adapter(idlora_ext.apply(model, adapter_name="b", target_modules=["down_proj"], **FIELDS), "b")
    randomize_adapter(idlora_ext.apply(model, adapter_name="c", **FIELDS), "c", seed=2)
    only_c = logits(model)
    model.set_adapter("a")
    assert torch.equal(logits(model), only_a)
    idlora_ext.remove(model, "b")
    model.set_adapter("c")
    assert torch.equal(logits(model), only_c)
    idlora_ext.remove(model, "c")
    assert not any(isinstance(m, (UnfusedExperts, ExpertLinear)) for m in model.modules())
    assert torch.equal(logits(model), only_a)


def test_targeting():
    def adapted(**fields):
        return {
            n for n in layers_of(idlora_ext.apply(qwen3_moe(num_hidden_layers=3), **FIELDS, **fields)) if "mlp" in n
        }

    dense = {f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
    fused = {
        f"model.layers.{i}.mlp.experts.{e}.{p}" for i in (1, 2) for e in range(4) for p in ("gate_up_proj", "down_proj")
    }
    assert adapted() == dense | fused
    assert adapted(exclude_modules=["experts"]) == dense
    assert adapted(exclude_modules=["down_proj"]) == {n for n in dense | fused if not n.endswith("down_proj")}
    assert adapted(layers_to_transform=[1]) == {n for n in fused if ".1.mlp" in n}
    assert adapted(target_modules=["q_proj", "gate_up_proj"]) == {n for n in fused if n.endswith("gate_up_proj")}
    assert adapted(target_modules=r".*\.2\..*experts\.3\.down_proj") == {"model.layers.2.mlp.experts.3.down_proj"}
    assert adapted(target_modules=["up_proj"], exclude_modules=["experts"]) == {"model.layers.0.mlp.up_proj"}
    ranks = {
        row.name: row.r
        for row in idlora_ext.summary(
            idlora_ext.apply(qwen3_moe(), rank_pattern={r"experts\.\d+\.gate_up_proj": 4}, **FIELDS)
        ).rows
    }
    assert ranks["model.layers.1.mlp.experts.2.gate_up_proj"] == 4
    assert ranks["model.layers.1.mlp.experts.2.down_proj"] == 8


class Foreign(nn.Module):
    """Fused experts with a forward of their own that nothing describes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 16, 32))
        self.down = nn.Parameter(torch.randn(4, 32, 16))
        self.blocks = nn.Parameter(torch.zeros(4, 32, 2, 4, dtype=torch.uint8), requires_grad=False)  # as MXFP4 packs

    def forward(self, h):
        return (torch.einsum("nd,edf->enf", h, self.up).relu() @ self.down).sum(0)


def foreign():
    layers = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(16, 16), "experts": Foreign()}) for _ in range(2))
    return nn.ModuleDict({"layers": layers, "conv": nn.Conv1d(3, 3, 3), "bilinear": nn.Bilinear(3, 4, 5)})


def llama4():
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    sizes = {"intermediate_size": 32, "intermediate_size_mlp": 64, "num_local_experts": 4}
    return seeded(Llama4ForCausalLM, Llama4TextConfig, **(SIZES | sizes))


def hooked():
    """As tensor parallelism does it: the sum over ranks is a hook, which calling the experts one by one would miss."""
    model = mixtral()
    model.model.layers[1].mlp.experts.register_forward_hook(lambda module, args, output: output)
    return model


def partitioned():
    """As DeepSpeed ZeRO-3 does it: parameters are empty until they are gathered."""
    model = mixtral()
    for parameter in model.model.layers[1].mlp.experts.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    return model


def expert_parallel():
    model = mixtral()
    model.model.layers[1].mlp.experts._is_expert_parallel = True
    return model


REFUSED = {
    "hooked": (hooked, {}, r"cannot open: model.layers.1.mlp.experts.gate_up_proj \[4, 64, 64\]"),
    "partitioned": (partitioned, {}, r"cannot open: model.layers.1.mlp.experts.gate_up_proj \[0\]"),
    "expert parallel": (expert_parallel, {}, r"cannot open: model.layers.1.mlp.experts.gate_up_proj"),
    "foreign": (foreign, {}, r"cannot open: layers.\{0-1\}.experts.up \[4, 16, 32\], .*experts.down.*experts.blocks.*exclude_modules"),
    "llama4": (llama4, {}, r"layers.\{0-1\}.feed_forward.experts.gate_up_proj \[4, 64, 64\]"),
    "module by name": (qwen3_moe, {"target_modules": ["q_proj", "experts"]}, r"experts \(Qwen3MoeExperts: name its parameters"),
    "foreign by name": (foreign, {"target_modules": ["proj", "experts"]}, r"cannot open: layers.\{0-1\}.experts.up"),
    "router by name": (qwen3_moe, {"target_modules": ["q_proj", "gate"]}, r"model.layers.1.mlp.gate \(Qwen3MoeTopKRouter\)"),
    "half": (qwen3_moe, {"target_modules": ["q_proj", "gate_proj", "up_proj"]}, "names gate_proj, up_proj, which 'model.layers.1.mlp.experts' holds fused as gate_up_proj"),
    "old names": (mixtral, {"target_modules": ["q_proj", "w2"]}, "names w2, which .* holds fused as down_proj"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adapted_is_named_before_anything_changes(case):
    make, fields, message = REFUSED[case]
    model = make()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        idlora_ext.apply(model, **FIELDS, **fields)
    assert state_of(model) == before
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, IdLoraConfig(**FIELDS, **fields))
    assert state_of(model) == before


def test_leaving_foreign_experts_frozen_is_said_explicitly():
    assert set(layers_of(idlora_ext.apply(foreign(), exclude_modules=["experts"], **FIELDS))) == {
        "layers.0.proj",
        "layers.1.proj",
    }
    assert layers_of(idlora_ext.apply(llama4(), target_modules=["q_proj"], **FIELDS))


def test_the_router_can_be_trained_in_full(tmp_path):
    model = idlora_ext.apply(qwen3_moe(), modules_to_save=["gate"], **FIELDS)
    others = {n for n, p in model.named_parameters() if p.requires_grad and "idlora" not in n}
    assert others == {"model.layers.1.mlp.gate.modules_to_save.default.weight"}
    randomize_adapter(model)
    model.get_parameter(*others).data.neg_()
    idlora_ext.save(model, tmp_path)
    assert torch.equal(logits(idlora_ext.load(qwen3_moe(), tmp_path)), logits(model))


def test_a_failure_while_choosing_rows_puts_the_fused_experts_back():
    model = mixtral()
    experts_of(model)["model.layers.1.mlp.experts"].down_proj.data[2, 0, 0] = float("nan")
    before = state_of(model)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.experts.2.down_proj.*finite"):
        idlora_ext.apply(model, **FIELDS)
    assert state_of(model) == before


def test_messages_gather_layers_and_experts():
    with pytest.warns(UserWarning, match="narrow") as caught:
        idlora_ext.apply(mixtral(), r=32, num_clusters=4)
    assert "model.layers.{0-1}.mlp.experts.{0-3}.gate_up_proj (d = 64: r = 16 instead of 32)" in str(caught[0].message)


def test_inspection_counts_the_tokens_an_expert_receives():
    from idlora_ext.tools.inspection import alpha_statistics

    model = randomize_adapter(idlora_ext.apply(mixtral(), **FIELDS))
    rows = [[1, 2, 3], [4, 5]]  # ten choices of an expert in a layer
    seen = {name: [] for name in layers_of(model)}
    for name, layer in layers_of(model).items():
        layer.register_forward_pre_hook(lambda layer, args, name=name: seen[name].append(layer.alpha(args[0])))
    statistics = alpha_statistics(model, rows)
    for name, alphas in seen.items():
        if not alphas:
            assert name not in statistics
            continue
        alpha = torch.cat([a.flatten(0, -2) for a in alphas]).double()
        torch.testing.assert_close(torch.tensor(statistics[name]["mean"]).double(), alpha.mean(0))
    tokens = sum(len(a) for name, alphas in seen.items() if "layers.0.mlp" in name and "down" in name for a in alphas)
    assert tokens == 10


class Routed(nn.Module):
    """Experts as they were before transformers 5: a list of modules with a linear layer each."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, h):
        choice = self.gate(h).argmax(-1)
        y = torch.zeros_like(h)
        for i, expert in enumerate(self.experts):  # some receive no token at all
            y = y.index_add(0, (choice == i).nonzero()[:, 0], expert(h[choice == i]))
        return y


def test_a_list_of_experts_is_adapted_like_any_layers():
    torch.manual_seed(0)
    model = idlora_ext.apply(Routed(), exclude_modules=["gate"], r=4, num_clusters=2)
    assert set(layers_of(model)) == {f"experts.{i}" for i in range(4)}
    randomize_adapter(model)
    h = torch.randn(1, 16).expand(5, 16)  # all to one expert
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(h).sum().backward()
    gradients = [layer.idlora_adapter["default"].B.grad.abs().sum().item() for layer in layers_of(model).values()]
    assert sum(g > 0 for g in gradients) == 1
