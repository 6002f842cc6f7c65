"""The table of small models that tests adapt, and what is done with any of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from idlora_ext import IdLoraConfig
from idlora_ext.layer.layer import IdLoraLayer

# ---- what they are made of -------------------------------------------------------------------------------------------


def tiny_llama(seed: int = 0, **overrides: object) -> nn.Module:
    """Grouped-query Llama without biases: K and V are half as wide."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 101,
    }
    return LlamaForCausalLM(LlamaConfig(**(config | overrides))).eval()


def tiny_gpt2(seed: int = 0) -> nn.Module:
    """GPT-2: Conv1D layers with biases, tied embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return _with_biases(GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=101, n_positions=64)))


def tiny_bert(seed: int = 0) -> nn.Module:
    """BERT: Linear layers with biases, and a new classification head."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=101, num_labels=3
    )
    return _with_biases(BertForSequenceClassification(config))


def tiny_qwen2(seed: int = 0) -> nn.Module:
    """Qwen2: grouped-query, biases on Q, K and V only, here as large as in the real models."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=101,
        )
    )
    return _with_biases(model, scale=100.0)


def _with_biases(model: nn.Module, scale: float = 0.5) -> nn.Module:
    """Transformers starts biases at zero, which would hide mistakes with them."""
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") and "norm" not in name.lower() and "ln_" not in name:
            nn.init.normal_(parameter, std=scale)
    return model.eval()


def tiny_moe() -> nn.Module:
    """Qwen3-MoE: a dense layer, and one whose experts are fused 3-D parameters."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=101, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[0],
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


def llama_in_8_bits() -> nn.Module:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    pytest.importorskip("bitsandbytes")
    quantised = BitsAndBytesConfig(load_in_8bit=True)
    with tempfile.TemporaryDirectory() as folder:
        tiny_llama().save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantised, device_map="cpu").eval()


class MLP(nn.Module):
    """Not a transformers model: biases, no configuration, one positional argument."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1, self.head = nn.Linear(20, 64), nn.Linear(64, 32), nn.Linear(32, 3)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.lin1(torch.relu(self.lin0(X)))))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return MLP().eval()


class Invariant(nn.Linear):
    """A base layer whose rows do not depend on their batch, as those of a matrix product may."""

    def forward(self, h):
        y = (h.unsqueeze(-2) * self.weight).sum(-1)
        return y if self.bias is None else y + self.bias


# ---- the table -------------------------------------------------------------------------------------------------------

# Fits every layer of the models; the paper's equations, as they stand.
FIELDS = {"r": 8, "num_clusters": 2, "router": "linear", "selection": "nearest", "row_scale": False, "center": False}


class Model(NamedTuple):
    """How a model is made, and the names that tests need of it."""

    make: Callable[..., nn.Module]
    head: str  # trained in full where a test asks for modules_to_save
    layer: str  # one adapted layer
    one: str  # a target, and another one that shares no layer with it
    other: str
    new_head: bool = False  # a few classes hold no k * r rows: to be left out
    quantised: bool = False

    def fields(self, **fields: Any) -> dict[str, Any]:
        """The fields of a configuration that fits."""
        return FIELDS | ({"exclude_modules": [self.head]} if self.new_head else {}) | fields

    def config(self, **fields: Any) -> IdLoraConfig:
        return IdLoraConfig(**self.fields(**fields))


MODELS = {
    "llama": Model(tiny_llama, "lm_head", "model.layers.0.self_attn.q_proj", "q_proj", "up_proj"),
    "gpt2": Model(tiny_gpt2, "ln_f", "transformer.h.0.attn.c_attn", "c_attn", "c_fc"),
    "bert": Model(
        tiny_bert,
        "classifier",
        "bert.encoder.layer.0.attention.self.query",
        "query",
        "intermediate.dense",
        new_head=True,
    ),
    "qwen2": Model(tiny_qwen2, "lm_head", "model.layers.0.self_attn.q_proj", "q_proj", "up_proj"),
    "moe": Model(tiny_moe, "lm_head", "model.layers.1.mlp.experts.3.down_proj", "down_proj", "q_proj"),
    "llama-8-bits": Model(
        llama_in_8_bits, "lm_head", "model.layers.0.self_attn.q_proj", "q_proj", "up_proj", quantised=True
    ),
    "mlp": Model(mlp, "head", "lin0", "lin0", "lin1", new_head=True),
}
# Linear and Conv1D, with and without biases, grouped queries: what the equations are checked on.
PLAIN = ("llama", "gpt2", "bert", "qwen2")
# What PEFT's own behaviour is checked on, as its tests have rows of models: experts, 8 bits and no transformers model too.
OF_PEFT = ("llama", "gpt2", "bert", "moe", "llama-8-bits", "mlp")


# ---- what is done with them ------------------------------------------------------------------------------------------


def inputs(batch: int = 2, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 101, (batch, length), generator=torch.Generator().manual_seed(seed))}


def logits(model: nn.Module) -> Tensor:
    """What a model of the table returns, always for the same input."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.no_grad():
        if isinstance(base, MLP):
            return model(torch.randn(5, 20, generator=torch.Generator().manual_seed(0)))
        return model(**inputs()).logits


def randomize_adapter(model: nn.Module, adapter_name: str = "default", std: float = 0.05, seed: int = 1) -> nn.Module:
    """Give B values, as training would: with B = 0 an adapter does nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(f"idlora_adapter.{adapter_name}.B"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def randomize_static(model: nn.Module, adapter_name: str = "default", seed: int = 1) -> nn.Module:
    """Give B and the constants of a static router values, as training would."""
    randomize_adapter(model, adapter_name, std=0.2, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(f"idlora_adapter.{adapter_name}.router"):
            parameter.data.copy_(1 + 0.5 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def adapted(row: Model, adapter_name: str = "default", seed: int = 1, **fields: Any) -> PeftModel:
    model = get_peft_model(row.make(), row.config(**fields), adapter_name=adapter_name).eval()
    return randomize_adapter(model, adapter_name, seed=seed)


def add(model: PeftModel, row: Model, adapter_name: str, seed: int, **fields: Any) -> None:
    model.add_adapter(adapter_name, row.config(**fields))
    randomize_adapter(model, adapter_name, seed=seed)


def adapted_static(kind: str = "llama", dtype: torch.dtype = torch.float64, **fields: Any) -> PeftModel:
    row = MODELS[kind]
    return randomize_static(get_peft_model(row.make().to(dtype), row.config(**{"router": "static"} | fields)))


def training_losses(model: nn.Module) -> list[float]:
    """Of ten steps of AdamW on one batch."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(**inputs(), labels=inputs()["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def modules_of(model):
    return {name: id(module) for name, module in model.named_modules()}


def layers_of(model):
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, IdLoraLayer)}


def state_of(model):
    """Everything a failure must not change."""
    return (
        modules_of(model),
        {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()},
        sorted(vars(model)),
        dict(getattr(model, "peft_config", {})),
        model.training,
    )


CLOSE = {"rtol": 1e-9, "atol": 1e-9}  # of float64 that was summed in another order


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.clone() for name, parameter in model.named_parameters()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
