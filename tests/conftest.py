"""Small models and problems that several test files share."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from idlora_ext import IdLoraConfig
from idlora_ext.cli import main
from idlora_ext.layer.layer import IdLoraLayer

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def adapter_tensors(
    d: int,
    k: int,
    r: int,
    s: int,
    *,
    shared: bool = False,
    static: bool = False,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Random index, router and B of one layer, scaled so that the update is of the size of the activation."""
    index = torch.randperm(d)[: k * r].view(k, r).to(torch.int32)
    rows = 1 if shared else k
    router = torch.randn(rows, r, dtype=torch.float64) / (k * r) ** 0.5
    if static:
        router = 1 + 0.5 * torch.randn(rows, dtype=torch.float64)
    B = torch.randn(d // s, r // s, dtype=torch.float64) / (r // s) ** 0.5
    return index.to(device), router.to(device, dtype), B.to(device, dtype)


# What there is to choose of an operator's router and rows: what `adapter_tensors` takes, and `options`.
FORMS: dict[str, dict[str, bool]] = {
    "per-cluster": {},
    "shared": {"shared": True},
    "static-per-cluster": {"static": True},
    "static": {"static": True, "shared": True},
    "bounded": {"shared": True, "bounded": True},
    "per-cluster, scaled": {"scaled": True},
    "static, scaled": {"static": True, "shared": True, "scaled": True},
    "bounded, scaled": {"shared": True, "bounded": True, "scaled": True},
}


def tensors_of(form: dict[str, bool], *shape: int, **fields: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Index, router and B of a form."""
    return adapter_tensors(*shape, **{name: form.get(name, False) for name in ("shared", "static")}, **fields)


def options(form: dict[str, bool], index: Tensor) -> dict[str, Any]:
    """What an operator takes beside the tensors: ``row_scale`` and ``bounded``."""
    c = 0.5 + torch.rand(index.shape, generator=torch.Generator().manual_seed(3))
    return {"row_scale": c.to(index.device) if form.get("scaled") else None, "bounded": form.get("bounded", False)}


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


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "bert": tiny_bert, "qwen2": tiny_qwen2}
# Fits every layer of the models above; the paper's equations, as they stand.
FIELDS = {"r": 8, "num_clusters": 2, "router": "linear", "selection": "nearest", "row_scale": False, "center": False}


def inputs(batch: int = 2, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 101, (batch, length), generator=torch.Generator().manual_seed(seed))}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**inputs()).logits


def randomize_adapter(model: nn.Module, adapter_name: str = "default", std: float = 0.05, seed: int = 1) -> nn.Module:
    """Give B values, as training would: with B = 0 an adapter does nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(f"idlora_adapter.{adapter_name}.B"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


HEADS = {"bert": {"exclude_modules": ["classifier"]}}  # a new head: 3 classes hold no k * r rows


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


def fields_for(kind, **fields):
    return FIELDS | HEADS.get(kind, {}) | fields


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


# Rows of models, as PEFT's own tests have them.


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


class Row(NamedTuple):
    make: Any
    head: str  # trained in full where a test asks for modules_to_save
    layer: str  # one adapted layer
    one: str  # a target, and another one that shares no layer with it
    other: str
    quantised: bool = False


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


ROWS = {
    "llama": Row(tiny_llama, "lm_head", "model.layers.0.self_attn.q_proj", "q_proj", "up_proj"),
    "gpt2": Row(tiny_gpt2, "ln_f", "transformer.h.0.attn.c_attn", "c_attn", "c_fc"),
    "bert": Row(tiny_bert, "classifier", "bert.encoder.layer.0.attention.self.query", "query", "intermediate.dense"),
    "moe": Row(tiny_moe, "lm_head", "model.layers.1.mlp.experts.3.down_proj", "down_proj", "q_proj"),
    "llama-8-bits": Row(llama_in_8_bits, "lm_head", "model.layers.0.self_attn.q_proj", "q_proj", "up_proj", True),
    "mlp": Row(mlp, "head", "lin0", "lin0", "lin1"),
}


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> Row:
    return ROWS[request.param]


def settings(row: Row, **fields: Any) -> IdLoraConfig:
    exclude = {} if row.head in ("lm_head", "ln_f") else {"exclude_modules": [row.head]}
    return IdLoraConfig(**(FIELDS | exclude | fields))


def adapted(row: Row, adapter_name: str = "default", seed: int = 1, **fields: Any) -> PeftModel:
    model = get_peft_model(row.make(), settings(row, **fields), adapter_name=adapter_name).eval()
    return randomize_adapter(model, adapter_name, seed=seed)


def add(model: PeftModel, row: Row, adapter_name: str, seed: int, **fields: Any) -> None:
    model.add_adapter(adapter_name, settings(row, **fields))
    randomize_adapter(model, adapter_name, seed=seed)


def output(model: nn.Module) -> torch.Tensor:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.no_grad():
        if isinstance(base, MLP):
            return model(torch.randn(5, 20, generator=torch.Generator().manual_seed(0)))
        return model(**inputs()).logits


# ---- text ------------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def byte_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte: token numbers can be counted by eye, and any text can be read back."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["</s>", "<s>", "<user>", "<assistant>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"eos_token": "</s>", "pad_token": "</s>", "bos_token": "<s>"}
    extra = ["<user>", "<assistant>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **special, additional_special_tokens=extra, chat_template=TEMPLATE
    )


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


# ---- what the tests of the commands share ----------------------------------------------------------------------------

ADAPTER = ["--r", "8", "--num-clusters", "2"]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a model and a tokenizer of one token a byte."""
    directory = tmp_path_factory.mktemp("model")
    tiny_llama(vocab_size=260, bos_token_id=1, eos_token_id=0, pad_token_id=0).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def pairs_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prompts of several lengths, all with the same answer: soon learnt."""
    records = [{"prompt": f"{10**i} times 0 is", "completion": " nothing"} for i in range(20)]
    return str(write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", *records))


@pytest.fixture(scope="session")
def text_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"{i} and {i} make {2 * i}.\n" for i in range(150)))
    return str(path)


@pytest.fixture(scope="session")
def run_path(model_path: str, pairs_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a short fine-tuning."""
    output = tmp_path_factory.mktemp("runs") / "run"
    options = ["--steps", "12", "--every", "4", "--lr", "2e-2", "--dropout", "0.1"]
    assert main(["finetune", model_path, pairs_path, "--output", str(output), *options, *ADAPTER]) == 0
    return output


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that must fail, and return its message."""
    capsys.readouterr()
    try:
        code = main(argv)
    except SystemExit as end:  # argparse's own
        code = end.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.startswith("idlora: error: ")
    assert captured.err.count("\n") == 1
    return captured.err
