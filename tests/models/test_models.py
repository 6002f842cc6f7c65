"""Models beyond decoders: encoder, vision transformer, encoder-decoder, vision and language. The first two are real."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from assets import dinov2, gsm8k, minilm
from peft import PeftModel, get_peft_model
from torch import nn

import idlora_ext
from idlora_ext import IdLoraConfig
from tests.helpers.models import FIELDS, inputs, layers_of, randomize_adapter, state_of, tiny_gpt2, tiny_llama


class MiniLM:
    """Learns to put a problem next to its answer."""

    fields: ClassVar = {"r": 32, "exclude_modules": ["pooler.dense"]}  # the pooler's output is not used
    lr = 1e-3
    steps = 4

    def make(self):
        from transformers import AutoModel

        return AutoModel.from_pretrained(minilm()).eval()

    def batch(self):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(minilm())
        rows = gsm8k()[:5]
        texts = [row["prompt"] for row in rows] + [row["completion"] for row in rows]
        return dict(tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=32))

    def output(self, model, batch):
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def loss(self, model, batch):
        questions, answers = self.output(model, batch).chunk(2)
        return F.cross_entropy(questions @ answers.T / 0.05, torch.arange(len(questions)))


class DINOv2:
    """Learns to tell horizontal, vertical and diagonal stripes in noise apart, with a new head."""

    fields: ClassVar = {"r": 32, "modules_to_save": ["classifier"]}
    lr = 1e-3
    steps = 4

    def make(self):
        from transformers import Dinov2ForImageClassification

        torch.manual_seed(0)  # of the new head
        return Dinov2ForImageClassification.from_pretrained(dinov2(), num_labels=3).eval()

    def batch(self):
        torch.manual_seed(0)
        line = torch.arange(112.0)
        waves = [line[None, :] + 0 * line[:, None], line[:, None] + 0 * line[None, :], line[None, :] + line[:, None]]
        stripes = torch.stack([torch.sin(waves[i] / 3) for i in range(3)])[:, None].expand(3, 3, 112, 112)
        return {"pixel_values": stripes + torch.randn(stripes.shape), "labels": torch.arange(3)}

    def output(self, model, batch):
        return model(**batch).logits

    def loss(self, model, batch):
        return model(**batch).loss


class Text:
    """A small random model that learns a few sequences by heart."""

    fields = FIELDS
    lr = 1e-2
    steps = 12

    def batch(self):
        ids = inputs(4, 12)["input_ids"]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def output(self, model, batch):
        return model(**batch).logits

    def loss(self, model, batch):
        return model(**batch).loss

    def generate(self, model, batch):
        batch = {name: tensor for name, tensor in batch.items() if name != "labels"}
        return model.generate(**batch, max_new_tokens=5, do_sample=False)


class GPT2(Text):
    """Conv1D layers with biases."""

    def make(self):
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 101, "n_positions": 64}
        tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        model = GPT2LMHeadModel(GPT2Config(**sizes, **tokens, initializer_range=0.1))
        for name, parameter in model.named_parameters():
            if name.endswith(("c_attn.bias", "c_proj.bias", "c_fc.bias")):
                nn.init.normal_(parameter, std=0.1)
        return model.eval()


class T5(Text):
    """Encoder and decoder, one embedding under four names, no biases."""

    def make(self):
        from transformers import T5Config, T5ForConditionalGeneration

        torch.manual_seed(0)
        sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 101}
        gated = {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
        return T5ForConditionalGeneration(T5Config(**sizes, **gated)).eval()


VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LANGUAGE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
LANGUAGE |= {"num_key_value_heads": 2, "vocab_size": 101, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


class Llava(Text):
    """CLIP tower, projector, Llama."""

    def make(self):
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

        torch.manual_seed(0)
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**VISION, image_size=16, patch_size=8),
            text_config=LlamaConfig(**LANGUAGE),
            image_token_index=100,
            vision_feature_layer=-1,
        )
        return LlavaForConditionalGeneration(config).eval()

    def batch(self):
        batch = super().batch()
        batch["input_ids"] = batch["input_ids"].clamp(max=99)
        batch["input_ids"][:, 1:5] = 100  # four patches
        batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] == 100, -100)
        generator = torch.Generator().manual_seed(0)
        return batch | {"pixel_values": torch.randn(4, 3, 16, 16, generator=generator)}


class Qwen2VL(Text):
    """Fused qkv in the vision tower, a merger, biases on the language model's q, k and v, three-axis positions."""

    def make(self):
        from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

        torch.manual_seed(0)
        rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
        config = Qwen2VLConfig(
            vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "patch_size": 8},
            text_config=LANGUAGE | {"rope_parameters": rope},
            image_token_id=100,
            video_token_id=99,
            vision_start_token_id=98,
            vision_end_token_id=97,
        )
        return Qwen2VLForConditionalGeneration(config).eval()

    def batch(self):
        batch = super().batch()
        batch["input_ids"] = batch["input_ids"].clamp(max=96)
        batch["input_ids"][:, 1], batch["input_ids"][:, 2:6], batch["input_ids"][:, 6] = 98, 100, 97
        batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] > 96, -100)
        patches = torch.randn(4 * 16, 3 * 2 * 8 * 8, generator=torch.Generator().manual_seed(0))
        image = {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]] * 4)}
        return batch | image | {"mm_token_type_ids": (batch["input_ids"] == 100).int()}


CASES = {"minilm": MiniLM(), "dinov2": DINOv2(), "gpt2": GPT2(), "t5": T5(), "llava": Llava(), "qwen2-vl": Qwen2VL()}
REAL = {name: pytest.param(name, marks=pytest.mark.real_model) for name in ("minilm", "dinov2")}

DOORS = {
    "apply": (lambda model, **fields: idlora_ext.apply(model, progress=False, **fields), idlora_ext.load),
    "get_peft_model": (
        lambda model, **fields: get_peft_model(model, IdLoraConfig(**fields)),
        PeftModel.from_pretrained,
    ),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", [REAL.get(name, name) for name in CASES])
def test_trains_saves_and_reloads(name, door, tmp_path):
    case, (adapt, load) = CASES[name], DOORS[door]
    model, batch = case.make(), case.batch()
    model = adapt(model, **case.fields)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=case.lr)
    torch.manual_seed(0)  # of the model's dropout: MiniLM's first loss is 0.09 to 0.27 by it alone
    losses = []
    for _ in range(case.steps):
        loss = case.loss(model.train(), batch)
        loss.backward()
        optimizer.step()
        missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.03, losses

    model.eval().save_pretrained(tmp_path)
    reloaded = load(case.make(), tmp_path).eval()
    with torch.no_grad():
        trained = case.output(model, batch)
        assert torch.equal(case.output(reloaded, batch), trained)
        assert not torch.equal(case.output(case.make(), batch), trained)
        if isinstance(case, Text):
            assert torch.equal(case.generate(reloaded, batch), case.generate(model, batch))
    idlora_ext.remove(model)


@pytest.mark.parametrize("name", ["t5", "llava", "qwen2-vl"])
def test_every_linear_layer_but_the_head_is_adapted(name):
    model = CASES[name].make()
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    untouched = CASES[name].output(model, CASES[name].batch())
    adapted = set(layers_of(idlora_ext.apply(model, **FIELDS)))
    assert linear - adapted == {"lm_head"}
    torch.testing.assert_close(CASES[name].output(model, CASES[name].batch()), untouched)


def test_parts_of_a_vision_language_model():
    def parts(**fields):
        return {name.split(".")[1] for name in layers_of(idlora_ext.apply(Llava().make(), **FIELDS, **fields))}

    assert parts() == {"vision_tower", "multi_modal_projector", "language_model"}
    assert parts(exclude_modules=r".*vision_tower.*") == {"multi_modal_projector", "language_model"}
    assert parts(target_modules=r".*language_model.*_proj") == {"language_model"}


def test_the_task_is_read_off_the_model():
    def task(case):
        return idlora_ext.apply(case.make(), **FIELDS).peft_config["default"].task_type

    assert (task(T5()), task(GPT2()), task(Llava())) == ("SEQ_2_SEQ_LM", "CAUSAL_LM", None)


@pytest.mark.real_model
def test_a_new_image_classification_head_is_trained_in_full():
    model = idlora_ext.apply(DINOv2().make(), r=32, selection="sequential")
    head = {n for n, p in model.named_parameters() if p.requires_grad and "idlora" not in n}
    assert head == {"classifier.modules_to_save.default.weight", "classifier.modules_to_save.default.bias"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_t5(dtype, tmp_path):
    """transformers loads ``wo`` of a float16 T5 in float32, so layers of one block differ in dtype."""
    from transformers import T5ForConditionalGeneration

    T5().make().save_pretrained(tmp_path / "base")
    batch = T5().batch()

    def base():
        return T5ForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=dtype).eval()

    model = base()
    assert model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == {torch.float16: torch.float32}.get(
        dtype, dtype
    )
    with torch.no_grad():
        untouched = model(**batch).logits
        idlora_ext.apply(model, **FIELDS)
        assert torch.equal(model(**batch).logits, untouched)
    randomize_adapter(model)
    model(**batch).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(idlora_ext.load(base(), tmp_path / "adapter")(**batch).logits, model(**batch).logits)


class Shared(nn.Module):
    """One module under two names, as heads of detection transformers are."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.head = nn.Linear(16, 16)
        self.decoder = nn.ModuleDict({"head": self.head})


REFUSED = {
    "tied embedding": (lambda: tiny_llama(tie_word_embeddings=True), ["q_proj", "embed_tokens"], r"model.embed_tokens \(Embedding\)"),
    "shared embedding": (T5().make, ["q", "shared"], r"shared \(Embedding\)"),
    "position embedding": (tiny_gpt2, ["c_attn", "wpe"], r"transformer.wpe \(Embedding\)"),
    "patch embedding": (Llava().make, ["q_proj", "patch_embedding"], r"vision_tower.embeddings.patch_embedding \(Conv2d\)"),
    "3-D patch embedding": (Qwen2VL().make, ["q_proj", "proj"], r"visual.patch_embed.proj \(Conv3d\)"),
    "1-D convolution": (lambda: nn.ModuleDict({"fine": nn.Linear(16, 16), "conv": nn.Conv1d(16, 16, 3)}), ["fine", "conv"], r"conv \(Conv1d\)"),
    "norm": (tiny_llama, ["q_proj", "norm"], r"model.norm \(LlamaRMSNorm\)"),
    "two names": (Shared, ["first", "head"], r"head \(the same module is also decoder.head"),
    "two names, all": (Shared, "all-linear", r"head \(the same module is also decoder.head.*exclude_modules"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_linear_layer_is_named_before_anything_changes(case):
    make, targets, message = REFUSED[case]
    model = make()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        idlora_ext.apply(model, target_modules=targets, **FIELDS)
    assert state_of(model) == before
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, IdLoraConfig(target_modules=targets, **FIELDS))
    assert state_of(model) == before


def test_a_head_tied_to_the_embedding_can_be_adapted_by_name(tmp_path):
    """The adapter follows the head's output and never touches ``W``, so the embedding stays what it was."""

    def base():
        return tiny_llama(tie_word_embeddings=True)

    model = base()
    embedding = model.model.embed_tokens.weight
    idlora_ext.apply(model, target_modules=["lm_head"], rank_boost=1, **FIELDS)
    randomize_adapter(model)
    assert model.lm_head.base_layer.weight is embedding
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**inputs()).logits
        assert torch.equal(idlora_ext.load(base(), tmp_path)(**inputs()).logits, expected)
        assert not torch.equal(base()(**inputs()).logits, expected)
