"""How much of the products with the chosen rows do all tokens share? ``z = sum_i x_i``, ``x_i = y0[index_i]``.

For each kind of layer of SmolLM2-135M on worked problems of GSM8K: the size of ``z``, how much of its mean square is
the square of its mean over tokens, and how many directions of ``r`` hold what there is (the participation ratio
``(sum_j l_j)^2 / sum_j l_j^2`` of the eigenvalues of ``E[z z^T]``); as it is, and with ``center=True``, whose mean is
of other text. Medians over the layers of a kind.

    python benchmarks/bench_centering.py               # half a minute on one core
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from harness.machine import describe
from harness.small_model import load, rows
from torch import Tensor

import idlora_ext
from idlora_ext.layer.adapter import BaseOutput
from idlora_ext.layer.layer import IdLoraLayer

COLUMNS = {"rms": "rms of z", "mean_share": "share of the mean", "directions": "directions of r"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "centering.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    calibration, text = rows()
    model = idlora_ext.apply(load(), r=options.r, router="static", selection="nearest", row_scale=False).eval()
    report = {"machine": describe(), "r": options.r, "tokens": text.numel(), "calibration_tokens": calibration.numel()}
    plain = products(model, text)  # the mean is zero still
    idlora_ext.calibrate(model, [{"input_ids": ids} for ids in calibration.split(16)])
    centered = products(model, text)
    verify(model, plain, centered)
    print(f"{'layer':<10}" + "".join(f" {column:>18} {'centred':>8}" for column in COLUMNS.values()))
    report["kinds"] = {}
    for kind in dict.fromkeys(name.rpartition(".")[2] for name in plain):
        found = [
            {key: statistics.median(s[key] for n, s in side.items() if n.endswith(kind)) for key in COLUMNS}
            for side in ({n: describe_products(z) for n, z in zs.items()} for zs in (plain, centered))
        ]
        report["kinds"][kind] = dict(zip(("plain", "centered"), found, strict=True))
        print(f"{kind:<10}" + "".join(f" {found[0][key]:>18.2f} {found[1][key]:>8.2f}" for key in COLUMNS))
    options.output.write_text(json.dumps(report, indent=1) + "\n")


@torch.no_grad()
def products(model: torch.nn.Module, text: Tensor) -> dict[str, Tensor]:
    """``z [tokens, r]`` of each layer."""
    found: dict[str, list[Tensor]] = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, IdLoraLayer)}

    def observe(name: str, y0: Tensor) -> None:
        x = layers[name].idlora_adapter["default"].gather(BaseOutput(y0))
        found.setdefault(name, []).append(x.sum(-2).flatten(0, 1))

    hooks = [
        layer.base_layer.register_forward_hook(lambda _, __, y0, name=name: observe(name, y0))
        for name, layer in layers.items()
    ]
    for ids in text.split(8):
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def verify(model: torch.nn.Module, plain: dict[str, Tensor], centered: dict[str, Tensor]) -> None:
    """Centred products are the plain ones less one vector for all tokens, that of the definition."""
    for name, layer in model.named_modules():
        if isinstance(layer, IdLoraLayer):
            adapter = layer.idlora_adapter["default"]
            m = adapter.mean[adapter.index.long()].sum(0)
            torch.testing.assert_close(centered[name], plain[name] - m, rtol=1e-3, atol=1e-3 * float(m.abs().max()))


def describe_products(z: Tensor) -> dict[str, float]:
    z = z.double()
    square = z.square().mean()
    eigenvalues = torch.linalg.svdvals(z).square()
    return {
        "rms": float(square.sqrt()),
        "mean_share": float(z.mean(0).square().mean() / square),
        "directions": float(eigenvalues.sum() ** 2 / eigenvalues.square().sum()),
    }


if __name__ == "__main__":
    main()
