"""A model of a GPU's step, by counted bytes: what every operator of a decoder layer reads, writes and computes.

    python -m benchmarks.compare.roofline

One decoder layer of Llama-3-8B runs forward, and backward to its input, in shapes alone (fake tensors), in bfloat16,
with each method's adapter as PEFT builds it. Every operator that eager PyTorch dispatches is counted
(``harness/traffic.py``)::

    seconds = max(bytes / bandwidth, flops / peak)          of an operator; of a step, their sum

So caches keep nothing from one operator to the next and every kernel runs at the machine's limit: no measurement, but
one rule for all. What the native kernels of ID-LoRA really ask for is in benchmarks/KERNELS.md. Launches, the output
head and the optimizer are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness.machine import describe
from harness.saved_activations import LLAMA_3_8B
from harness.table import table
from harness.traffic import Traffic
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig, LlamaForCausalLM

from idlora_ext.layer.layer import IdLoraLayer

from . import RESULTS, methods
from .experiment import write_json
from .methods import METHODS
from .run import trainable

BANDWIDTH, PEAK, PEAK_FLOAT32 = 3.35e12, 989e12, 67e12  # H100 SXM, NVIDIA's data sheet; bfloat16 without sparsity
B_OF = {  # which argument is B, and how many products there are with it or of its size
    torch.ops.idlora.adapt: (3, 1),
    torch.ops.idlora.adapt_backward: (4, 2),
    torch.ops.idlora.shared_gemm: (2, 1),
    torch.ops.idlora.shared_gemm_backward: (2, 2),
}
FROZEN, REFERENCE = "none", "lora-r32"
DEFAULT = (
    FROZEN,
    "lora-r8",
    REFERENCE,
    "miss-r8",
    "miss-r32",
    "dora-r8",
    "idlora-r32",
    "idlora-r32-pivoted",
    "idlora-r32-bounded",
    "idlora-r32-centered",
    "idlora-r128",
    "idlora-r128-centered",
)


class Modelled(Traffic):
    """Bytes, flops and seconds of whatever runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.bytes
        out = super().__torch_dispatch__(func, types, args, kwargs)
        flops = flops_of(func, args, kwargs or {}, out)
        wide = any(isinstance(t, Tensor) and t.dtype == torch.float32 for t in tree_leaves(args))
        self.flops += flops
        self.seconds += max((self.bytes - before) / BANDWIDTH, flops / (PEAK_FLOAT32 if wide else PEAK))
        return out


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    """Twice the products: PyTorch's own count, and that of the fused operators of ID-LoRA."""
    if func.namespace == "idlora":
        at, products = B_OF.get(func.overloadpacket, (0, 0))
        return 2.0 * products * args[0].numel() * args[at].shape[-1]
    count = flop_registry.get(func.overloadpacket)
    return count(*args, **kwargs, out_val=out) if count else 0.0


def decoder() -> nn.Module:
    """A decoder layer of Llama-3-8B; its embedding and head are as good as empty."""
    torch.manual_seed(0)
    sizes = LLAMA_3_8B | {"num_hidden_layers": 1, "vocab_size": 8, "max_position_embeddings": 8192}
    return LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16).requires_grad_(False)


def count(method: str, batch: int, length: int) -> dict[str, float]:
    """Forward and backward of one layer, down to its input."""
    # Which rows are chosen changes nothing here; "sequential" saves the time of clustering.
    adapter = METHODS[method].adapter
    if adapter["kind"] == "IdLoraConfig":
        adapter = adapter | {"selection": "sequential"}
    model = methods.apply(decoder(), adapter).to(torch.bfloat16)
    for module in model.modules():
        if isinstance(module, IdLoraLayer):
            module.idlora_adapter["default"].mean_taken = True  # a mean is taken in the first step only
    found: dict[str, float] = {"parameters": sum(p.numel() for p in trainable(model))}
    with FakeTensorMode(allow_non_fake_inputs=True):
        h = torch.zeros(batch, length, LLAMA_3_8B["hidden_size"], dtype=torch.bfloat16, requires_grad=True)
        for name, run in passes(model, h).items():
            with Modelled() as modelled:
                run()
            found |= {f"{name}_{key}": getattr(modelled, key) for key in ("bytes", "flops", "seconds")}
    return found


def passes(model: nn.Module, h: Tensor) -> dict[str, Callable[[], None]]:
    kept: list[Tensor] = []

    def forward() -> None:
        kept.append(model(inputs_embeds=h, use_cache=False).logits)

    def backward() -> None:
        torch.autograd.grad(kept[0], [h, *trainable(model)], torch.ones_like(kept[0]), allow_unused=True)

    return {"forward": forward, "backward": backward}


def page(counts: dict[str, dict[str, float]]) -> str:
    total = {
        m: {key: c[f"forward_{key}"] + c[f"backward_{key}"] for key in ("bytes", "flops", "seconds")}
        for m, c in counts.items()
    }
    base, reference = total[FROZEN], total[REFERENCE]
    lines = []
    for method, sums in total.items():
        row = [
            method,
            f"{counts[method]['parameters']:,.0f}",
            f"{sums['bytes'] / 1e9:.2f}",
            f"{sums['flops'] / 1e12:.2f}",
        ]
        row += [f"{1000 * counts[method][f'{p}_seconds']:.2f}" for p in ("forward", "backward")]
        row.append(f"{sums['seconds'] / base['seconds']:.3f}")
        if method == FROZEN:
            lines.append([*row, "", ""])
            continue
        shares = [(sums[key] - base[key]) / (reference[key] - base[key]) for key in ("bytes", "seconds")]
        lines.append([*row, *(f"{share:.2f}" for share in shares)])
    head = ["method", "parameters a layer", "GB", "TFLOP", "forward, ms", "backward, ms", "/ frozen"]
    return table([*head, f"bytes added / {REFERENCE}'s", "time added / the same"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(DEFAULT), metavar="NAME")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--output", type=Path, default=RESULTS / "roofline.json", help="(default: %(default)s)")
    options = parser.parse_args()
    wanted = dict.fromkeys((FROZEN, REFERENCE, *options.methods))
    counts = {method: count(method, options.batch, options.length) for method in wanted}
    settings = {"layer": LLAMA_3_8B, "batch": options.batch, "length": options.length, "dtype": "bfloat16"}
    settings |= {"bandwidth": BANDWIDTH, "peak": PEAK}
    write_json(options.output, {"machine": describe(), "settings": settings, "counts": counts})
    print(page(counts))


if __name__ == "__main__":
    main()
