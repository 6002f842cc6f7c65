"""What an adapter keeps for the backward pass: saved-tensor accounting of one Llama-3-8B decoder layer.

LoRA keeps ``h`` (``d_in`` values a token, once per distinct input) and ``A h`` (``r``) of every linear layer; ID-LoRA
keeps ``sum_i x_i`` (``r``), with the paper's router every ``x_i`` (``k r``). Counted is what autograd holds on to, not
a formula: the layer with an adapter minus the same frozen layer without one, for what one more token costs.

Two things besides decide what LoRA adds. Fused attention keeps its output for itself, which then serves as the input of
``o_proj`` too; eager attention makes a copy of it. And beside a bfloat16 layer PEFT makes adapters float32: LoRA casts
``h`` for each linear layer anew, and no two share it. (The frozen layer's own row is for these few tokens: eager
attention also keeps its weights, which grow with their square.)

    python benchmarks/bench_saved_activations.py [--tokens N] [--output FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from harness.machine import describe
from harness.saved_activations import LLAMA_3_8B, Saved, saved_activations
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from idlora_ext import IdLoraConfig

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, Callable[[], PeftConfig]] = {
    "LoRA r=32": lambda: LoraConfig(r=32, target_modules=LINEARS),
    "LoRA r=8": lambda: LoraConfig(r=8, target_modules=LINEARS),
    "LoRA r=32, A frozen": lambda: LoraConfig(r=32, target_modules=LINEARS),
    # Which rows are chosen changes nothing that is counted here; "sequential" saves the time of clustering.
    "ID-LoRA r=128": lambda: IdLoraConfig(r=128, target_modules=LINEARS, selection="sequential"),
    "ID-LoRA r=128, the paper's router": lambda: IdLoraConfig(
        r=128, target_modules=LINEARS, selection="sequential", router="linear", center=False
    ),
}
REFERENCE = "LoRA r=32"
FROZEN = "frozen layer"
ATTENTION = ("sdpa", "eager")
PRECISION = {  # dtype of the frozen layer, and whether autocast to bfloat16 is on
    "float32": (torch.float32, False),
    "bfloat16 with float32 adapters, PEFT's default": (torch.bfloat16, False),
    "the same under bfloat16 autocast, Trainer's bf16=True": (torch.bfloat16, True),
}


def decoder_layer(sizes: Mapping[str, int], attention: str, dtype: torch.dtype) -> LlamaDecoderLayer:
    """A frozen decoder layer with random weights."""
    torch.manual_seed(0)
    layer = LlamaDecoderLayer(LlamaConfig(**sizes, attn_implementation=attention), layer_idx=0)
    return layer.to(dtype).requires_grad_(False)


def layer_inputs(layer: LlamaDecoderLayer, tokens: int) -> dict[str, Any]:
    """What a decoder layer inside a model is called with: hidden states that need a gradient, rotary embeddings."""
    h = torch.randn(1, tokens, layer.hidden_size, generator=torch.Generator().manual_seed(1))
    h = h.to(layer.input_layernorm.weight.dtype).requires_grad_()
    rotary = LlamaRotaryEmbedding(layer.self_attn.config)
    return {"hidden_states": h, "position_embeddings": rotary(h, torch.arange(tokens)[None])}


@contextlib.contextmanager
def adapted(layer: LlamaDecoderLayer, config: PeftConfig, *, freeze_A: bool = False) -> Iterator[nn.Module]:
    """The layer with an untrained adapter, which is taken off again at the end."""
    model = get_peft_model(layer, config)
    try:
        for name, parameter in model.named_parameters():
            if freeze_A and "lora_A" in name:
                parameter.requires_grad_(False)
        yield model
    finally:
        model.unload()


def measure(layer: LlamaDecoderLayer, tokens: int) -> dict[str, Saved]:
    """What one more token makes each variant keep: the difference between ``2 tokens`` and ``tokens``.

    So whatever does not grow with the tokens drops out, such as weights cast by autocast.
    """
    inputs, twice = layer_inputs(layer, tokens), layer_inputs(layer, 2 * tokens)

    def per_token(module: nn.Module) -> Saved:
        return saved_activations(module, **twice).minus(saved_activations(module, **inputs)).per(tokens)

    saved = {FROZEN: per_token(layer)}
    expected = layer(**inputs)
    for name, config in ADAPTERS.items():
        with adapted(layer, config(), freeze_A=name.endswith("A frozen")) as model:
            if not torch.equal(model(**inputs), expected):
                raise SystemExit(f"{name}: the untrained adapter changes the output of the layer")
            saved[name] = per_token(model)
    return saved


def report(saved: dict[str, Saved]) -> list[dict[str, Any]]:
    """A row for each variant: what it keeps, what it adds to the frozen layer, and that beside LoRA r=32."""
    added = {name: total.minus(saved[FROZEN]) for name, total in saved.items()}
    return [
        {
            "variant": name,
            "values": saved[name].values,
            "bytes": saved[name].bytes,
            "values_added": added[name].values,
            "bytes_added": added[name].bytes,
            "values_ratio": round(added[name].values / added[REFERENCE].values, 4),
            "bytes_ratio": round(added[name].bytes / added[REFERENCE].bytes, 4),
        }
        for name in saved
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="counted at N and 2 N (default: 32)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="(default: results/saved_activations.json)")
    args = parser.parse_args()
    output = args.output or Path(__file__).parent / "results" / "saved_activations.json"

    print("Kept for backward per token, one Llama-3-8B decoder layer, all 7 linear layers adapted")
    results = []
    for precision, (dtype, autocast) in PRECISION.items():
        for attention in ATTENTION:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                rows = report(measure(decoder_layer(LLAMA_3_8B, attention, dtype), args.tokens))
            results.append({"precision": precision, "attention": attention, "variants": rows})
            print(f"\n{precision}; {attention} attention")
            print(f"{'':<34} {'values':>9} {'bytes':>9}   {'added values':>12} {'bytes':>9}   {'of ' + REFERENCE:>12}")
            for row in rows:
                print(
                    f"{row['variant']:<34} {row['values']:>9,.0f} {row['bytes']:>9,.0f}   "
                    f"{row['values_added']:>12,.0f} {row['bytes_added']:>9,.0f}   {row['bytes_ratio']:>12.1%}"
                )

    output.parent.mkdir(parents=True, exist_ok=True)
    settings = {"layer": LLAMA_3_8B, "linear_layers": LINEARS, "k": 4, "s": 2, "tokens": [args.tokens, 2 * args.tokens]}
    text = json.dumps({"machine": describe(), "settings": settings, "results": results}, indent=2)
    output.write_text(text + "\n")
    print(f"\nThe outputs of all untrained adapters equal that of the frozen layer, bit for bit. Written: {output}")


if __name__ == "__main__":
    main()
