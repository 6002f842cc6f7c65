"""The models that PEFT's tests ask the hub for, as small random ones in a hub cache of our own.

A cache has its layout for ever (``models--OWNER--NAME/refs/main``, ``snapshots/COMMIT``), so ``from_pretrained`` reads
it offline as if it had been downloaded: no test has to be changed. Architectures and names are theirs, sizes ours.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers as t

COMMIT = "0" * 40
# fmt: off
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
GROUPED = SMALL | {"num_key_value_heads": 2}
OPT = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128, "max_position_embeddings": 128}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 128}
T5 = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 128, "decoder_start_token_id": 0}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 128, "max_position_embeddings": 128}
DEBERTA = SMALL | {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["c2p", "p2c"]}
LLAMA = GROUPED | {"pad_token_id": 0}

MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (t.OPTForCausalLM, t.OPTConfig, OPT),
    # large enough for a list of targets to be shortened, as the real one is
    "peft-internal-testing/opt-125m": (t.OPTForCausalLM, t.OPTConfig, OPT | {"num_hidden_layers": 12}),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": (t.GPT2LMHeadModel, t.GPT2Config, GPT),
    "hf-internal-testing/tiny-random-gpt2": (t.GPT2LMHeadModel, t.GPT2Config, GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (t.GPTJForCausalLM, t.GPTJConfig, GPT | {"rotary_dim": 4}),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": (t.GPTNeoXForCausalLM, t.GPTNeoXConfig, SMALL),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (t.BloomForCausalLM, t.BloomConfig, {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 128}),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": (t.LlamaForCausalLM, t.LlamaConfig, LLAMA),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": (t.LlamaForCausalLM, t.LlamaConfig, LLAMA),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (t.LlamaForSequenceClassification, t.LlamaConfig, LLAMA),
    "hf-internal-testing/tiny-random-MistralForCausalLM": (t.MistralForCausalLM, t.MistralConfig, GROUPED),
    "peft-internal-testing/tiny-dummy-qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config, GROUPED | {"tie_word_embeddings": True}),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": (t.Qwen3ForCausalLM, t.Qwen3Config, GROUPED | {"head_dim": 8}),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (t.Gemma3ForCausalLM, t.Gemma3TextConfig, GROUPED | {"head_dim": 8, "sliding_window": 64}),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": (t.T5ForConditionalGeneration, t.T5Config, T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (t.T5ForConditionalGeneration, t.T5Config, T5),
    "peft-internal-testing/tiny-random-t5": (t.T5ForConditionalGeneration, t.T5Config, T5),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (t.BartForConditionalGeneration, t.BartConfig, BART),
    "peft-internal-testing/tiny-random-BertModel": (t.BertModel, t.BertConfig, SMALL),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (t.BertForSequenceClassification, t.BertConfig, SMALL),
    "peft-internal-testing/tiny-random-RobertaModel": (t.RobertaModel, t.RobertaConfig, SMALL),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (t.RobertaForSequenceClassification, t.RobertaConfig, SMALL),
    "peft-internal-testing/tiny-random-DebertaModel": (t.DebertaModel, t.DebertaConfig, DEBERTA),
    "peft-internal-testing/tiny-random-DebertaV2Model": (t.DebertaV2Model, t.DebertaV2Config, DEBERTA),
}
# fmt: on


def tokenizer() -> t.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{n}" for n in range(124))]
    whole = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    return t.PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make(cache: Path) -> None:
    """Write every model that the cache lacks."""
    for name, (cls, config, sizes) in MODELS.items():
        folder = cache / ("models--" + name.replace("/", "--"))
        if (folder / "refs" / "main").exists():
            continue
        torch.manual_seed(0)
        model = cls(config(**sizes)).eval()
        model.save_pretrained(folder / "snapshots" / COMMIT)
        tokenizer().save_pretrained(folder / "snapshots" / COMMIT)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(COMMIT)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
