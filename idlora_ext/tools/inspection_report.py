"""What an inspection found, as a table and as a picture."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from typing import Any

import torch


def table(report: dict[str, Any], *, every_layer: bool = False) -> str:
    """What :func:`inspect_model` or :func:`inspect_adapter` found: a line for each kind of layer, or each layer."""
    lines, legend = [], []
    for name, layers in _groups(report["layers"], every_layer).items():
        shape = {key: str(layers[0][key]) for key in ("d", "d_in", "k", "r", "s")}
        line = {"layer": name, "n": str(len(layers)), **shape}
        line["trainable"] = f"{sum(layer['trainable'] for layer in layers):,}"
        legend = ["n: layers of this kind"]
        if "B_rms" in layers[0]:
            line["rms B"] = f"{_mean(layer['B_rms'] for layer in layers):.1e}"
        if "rows" in layers[0]:
            rows = [layer["rows"] for layer in layers]
            line["spanned"] = f"{_mean(found['spanned'] for found in rows):.1%}"
            line["norm"] = f"{_mean(_mean(found['chosen_norm']) / (found['norm'] or 1.0) for found in rows):.2f}"
            legend += ["spanned: share of W that the chosen rows span", "norm: of the chosen rows, over that of all"]
            if "sizes" in rows[0]:
                sizes = [size for found in rows for size in found["sizes"]]
                line["sizes"] = f"{min(sizes)}-{max(sizes)}"
                line["between"] = f"{_mean(found['variance_explained'] for found in rows):.1%}"
                legend += ["sizes: rows nearest to each cluster", "between: variance explained by the clusters"]
        if observed := [layer["alpha"] for layer in layers if "alpha" in layer]:
            alpha = {key: [a for layer in observed for a in layer[key]] for key in ("mean", "std", "min", "max")}
            line["a mean"], line["std"] = f"{_mean(alpha['mean']):.3f}", f"{_mean(alpha['std']):.3f}"
            line["min"], line["max"] = f"{min(alpha['min']):.3g}", f"{max(alpha['max']):.3g}"
            legend += ["a: the router's weights a_i"]
        lines.append(line)
    head = {key: key for key in max(lines, key=len)}
    widths = {key: max(len(line.get(key, "")) for line in [head, *lines]) for key in head}
    text = [
        "  ".join(line.get(k, "").ljust(w) if k == "layer" else line.get(k, "").rjust(w) for k, w in widths.items())
        for line in [head, *lines]
    ]
    rule = "-" * len(text[0])
    return "\n".join([text[0], rule, *text[1:], rule, *_totals(report), "; ".join(legend)])


def _totals(report: dict[str, Any]) -> list[str]:
    layers, trainable, total = report["layers"], report["trainable_parameters"], report.get("total_parameters")
    notes = [f"{len(layers)} layers, {trainable:,} trainable parameters"]
    notes[0] += f" of {total:,} ({trainable / total:.2%})" if total else ""
    if shrunk := sum(layer.get("shrunk", False) for layer in layers):
        notes.append(f"{shrunk} layers are too narrow for k * r rows and get a smaller rank")
    if untrained := sum(layer.get("B_rms") == 0 for layer in layers):
        notes.append(f"B is zero in {untrained} layers: they were never trained and change nothing")
    return notes


def plot_alpha(report: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw mean and standard deviation of ``a_i`` over the tokens: one panel a kind of layer, one column a cluster."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    groups = _groups([layer for layer in report["layers"] if "alpha" in layer], every_layer=False)
    figure = Figure(figsize=(1.2 + 1.5 * len(groups), 7), dpi=150, layout="constrained")
    figure.suptitle("Router weights $a_i$ over the tokens, by layer and cluster")
    panels = figure.subplots(2, len(groups), squeeze=False)
    for row, (key, colours) in zip(panels, (("mean", "RdBu_r"), ("std", "viridis")), strict=True):
        values = {name: [layer["alpha"][key] for layer in layers] for name, layers in groups.items()}
        everything = torch.tensor([a for group in values.values() for line in group for a in line])
        limit = everything.abs().quantile(0.98).item() or 1.0  # a few outliers must not wash out the rest
        for axes, (name, group) in zip(row, values.items(), strict=True):
            low = -limit if key == "mean" else 0.0
            image = axes.imshow(group, aspect="auto", cmap=colours, vmin=low, vmax=limit, interpolation="nearest")
            axes.set_xticks(range(len(group[0])), [str(i + 1) for i in range(len(group[0]))])
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
            axes.tick_params(labelleft=axes is row[0])
            if key == "mean":
                axes.set_title(name.rpartition(".")[2], fontsize=9)
            else:
                axes.set_xlabel("cluster")
        row[0].set_ylabel("layer")
        figure.colorbar(image, ax=row, label=key, extend="both" if key == "mean" else "max")
    figure.savefig(path)


def _groups(layers: Sequence[dict[str, Any]], every_layer: bool) -> dict[str, list[dict[str, Any]]]:
    """Layers of one name but for its numbers, and of one shape: ``model.layers.*.self_attn.q_proj``."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for layer in layers:
        name = layer["name"] if every_layer else re.sub(r"(?<![^.])\d+(?![^.])", "*", layer["name"])
        groups.setdefault((name, *(layer[key] for key in ("d", "d_in", "k", "r", "s"))), []).append(layer)
    return {key[0] if len({k[0] for k in groups}) == len(groups) else f"{key[0]} {key[1:3]}": group
            for key, group in groups.items()}  # fmt: skip


def _mean(values: Any) -> float:
    values = list(values)
    return math.fsum(values) / len(values)
