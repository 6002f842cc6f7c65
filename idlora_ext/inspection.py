"""What an adapter is made of and what it does: layers, chosen rows, router weights, answers with and without it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

import idlora_ext

from .checkpoint import read_config, read_tensors
from .clustering import CLUSTERED
from .data import encode, encode_prompt, read_examples
from .layer import IdLoraLayer

PREFIX = "base_model.model."  # of PEFT's tensor names


def inspect_model(model: str, **fields: Any) -> dict[str, Any]:
    """What :func:`idlora_ext.apply` would do to a model, found on the meta device: no weights are read.

    Args:
        model: directory or hub name; only its ``config.json`` is needed.
        **fields: fields of :class:`idlora_ext.IdLoraConfig`.

    Returns:
        ``layers`` (one dictionary each, the fields of ``LayerSummary``) and the parameter counts.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(model)
    architecture = (getattr(config, "architectures", None) or ["AutoModelForCausalLM"])[0]
    with torch.device("meta"):
        if architecture.startswith("Auto") or not hasattr(transformers, architecture):
            empty = transformers.AutoModelForCausalLM.from_config(config)
        else:
            empty = getattr(transformers, architecture)(config)
    idlora_ext.apply(empty, progress=False, **fields)
    summary = idlora_ext.summary(empty)
    return {
        "kind": "model",
        "path": str(model),
        "layers": [asdict(row) for row in summary.rows],
        "trainable_parameters": summary.trainable_parameters,
        "total_parameters": summary.total_parameters,
    }


def inspect_adapter(
    path: str | os.PathLike[str],
    *,
    base: str | None = None,
    text: str | None = None,
    chat: bool = False,
    tokens: int = 4096,
) -> dict[str, Any]:
    """Describe a saved adapter.

    Args:
        path: its directory, or the ``.safetensors`` file alone.
        base: the model it was made from: adds ``rows`` to each layer, see :func:`row_statistics`.
        text: a file to run the adapted model on: adds ``alpha`` to each layer, see :func:`alpha_statistics`.
        chat: wrap its prompts and completions in the chat template.
        tokens: read at most so many of its tokens.

    Raises:
        ValueError: not an ID-LoRA adapter, or not of this base.
    """
    path = Path(path)
    file = path / SAFETENSORS_WEIGHTS_NAME if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    layers = _read_layers(file)
    report: dict[str, Any] = {"kind": "adapter", "path": str(path), "layers": layers}
    if (file.parent / "adapter_config.json").is_file():
        config = read_config(file.parent)
        report["config"] = {name: sorted(v) if isinstance(v, set) else v for name, v in config.to_dict().items()}
    report["trainable_parameters"] = sum(layer["trainable"] for layer in layers)
    if base is None:
        return report
    if file.name != SAFETENSORS_WEIGHTS_NAME:
        raise ValueError(f"{file}: to be put on a model the file must be called {SAFETENSORS_WEIGHTS_NAME}")
    from transformers import AutoTokenizer

    model = load_adapted(base, file.parent)
    report["total_parameters"] = sum(p.numel() for p in model.parameters())
    statistics = {"rows": row_statistics(model)}
    if text is not None:
        rows = encode(
            read_examples([text]), AutoTokenizer.from_pretrained(base), length=min(tokens, 512), chat=chat
        ).rows
        read = accumulate(len(row["input_ids"]) for row in rows)
        chosen = [row["input_ids"] for row, count in zip(rows, read, strict=True) if count <= tokens]
        statistics["alpha"] = alpha_statistics(model, chosen or [rows[0]["input_ids"]])
    for kind, by_layer in statistics.items():
        for layer in layers:
            if layer["name"] in by_layer:
                layer[kind] = by_layer[layer["name"]]
    return report


def load_adapted(base: str, adapter: str | os.PathLike[str], dtype: str = "auto") -> Any:
    """A causal language model with a saved adapter, on the CUDA device if there is one."""
    from transformers import AutoModelForCausalLM

    read_config(adapter)  # a wrong path is said before the model is loaded
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    idlora_ext.load(model, adapter)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _read_layers(file: Path) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(file).items():
        name, _, kind = key.removeprefix(PREFIX).rpartition(".")
        if kind.startswith("idlora_"):
            found.setdefault(name, {})[kind.removeprefix("idlora_")] = tensor
    if not found:
        raise ValueError(f"{file}: not an ID-LoRA adapter (no idlora_* tensors)")
    layers = []
    # In the order of the model: by the numbers in the names, not by their digits.
    for name, tensors in sorted(found.items(), key=lambda item: [int(n) for n in re.findall(r"\d+", item[0])]):
        if missing := {"index", "router", "B", "fingerprint"} - set(tensors):
            raise ValueError(f"{file}: layer {name} lacks {', '.join(sorted(missing))}")
        d, d_in = tensors["fingerprint"][:2].tolist()
        k, r = tensors["index"].shape
        layers.append(
            {
                "name": name,
                "d": d,
                "d_in": d_in,
                "k": k,
                "r": r,
                "s": r // tensors["B"].shape[1],
                "trainable": tensors["B"].numel() + tensors["router"].numel(),
                "B_rms": tensors["B"].float().square().mean().sqrt().item(),  # 0: never trained
            }
        )
    return layers


@torch.no_grad()
def row_statistics(model: Any, adapter_name: str = "default") -> dict[str, dict[str, Any]]:
    """What the chosen rows are of the rows of ``W``, by layer. Nothing is chosen again.

    ``spanned`` is ``|W P|^2 / |W|^2`` (Frobenius), ``P`` the projection on the span of all chosen rows: 1 where every
    row is a sum of chosen ones, as an interpolative decomposition wants it. ``chosen_norm`` is the mean norm of each
    ``A_i``'s rows, without row scales, and ``norm`` that of all rows.

    Of rows chosen from clusters also how these divide ``W``, every row counted to the nearest of the ``k`` means of
    chosen rows: ``sizes``, and ``variance_explained``, the share of the rows' variance that lies between the parts.
    """
    clustered = model.peft_config[adapter_name].selection in CLUSTERED
    statistics: dict[str, dict[str, Any]] = {}
    for name, layer in _layers(model, adapter_name):
        W, index = layer.get_base_weight().float(), layer.idlora_index[adapter_name].long()
        found = statistics[name] = {
            "spanned": _spanned(W, W[index.flatten()]),
            "chosen_norm": W[index].norm(dim=2).mean(1).tolist(),
            "norm": W.norm(dim=1).mean().item(),
        }
        if not clustered:
            continue
        label = torch.cdist(W, W[index].mean(1)).argmin(1)
        sizes = label.bincount(minlength=len(index))
        means = torch.zeros(len(index), W.shape[1], device=W.device).index_add_(0, label, W)
        means /= sizes.clamp_min(1)[:, None]
        centre = W.mean(0)
        total = (W - centre).square().sum()
        between = (sizes * (means - centre).square().sum(1)).sum()
        found |= {"sizes": sizes.tolist(), "variance_explained": (between / total).item() if total else 0.0}
    return statistics


def _spanned(W: Tensor, rows: Tensor) -> float:
    """The share of the squared norm of ``W`` in the span of ``rows``, which need not be independent."""
    A = rows.double()
    value, vector = torch.linalg.eigh(A @ A.T)  # k r of each, where A may have ten times as many columns
    kept = value > len(A) * torch.finfo(torch.float32).eps * value[-1]  # W has no more digits
    Q = (A.T @ (vector[:, kept] / value[kept].sqrt())).to(W.dtype)
    total = W.square().sum()
    return ((W @ Q).square().sum() / total).item() if total else 1.0


@torch.no_grad()
def alpha_statistics(
    model: nn.Module, rows: Sequence[Sequence[int]], adapter_name: str = "default"
) -> dict[str, dict[str, list[float]]]:
    """``mean``, ``std``, ``min`` and ``max`` over tokens of the router's ``a_i``, by layer, one value a cluster.

    The tokens are those a layer receives: an expert not all of them, and without any it is left out.

    Args:
        model: a transformers model with the adapter, which is at work while the rows are read.
        rows: rows of token ids.
    """
    moments: dict[str, list[Tensor]] = {}
    counts: dict[str, int] = {}

    def observe(name: str, layer: IdLoraLayer, h: Tensor) -> None:
        alpha = layer.alpha(h, adapter_name).flatten(0, -2).double()
        new = [alpha.sum(0), alpha.square().sum(0), alpha.amin(0), alpha.amax(0)]
        old = moments.get(name, [*map(torch.zeros_like, new[:2]), *new[2:]])
        counts[name] = counts.get(name, 0) + len(alpha)
        moments[name] = [old[0] + new[0], old[1] + new[1], old[2].minimum(new[2]), old[3].maximum(new[3])]

    hooks = [
        layer.register_forward_pre_hook(lambda layer, args, name=name: observe(name, layer, args[0]))
        for name, layer in _layers(model, adapter_name)
    ]
    try:
        device = next(model.parameters()).device
        for row in rows:
            model(input_ids=torch.tensor([row], device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return {
        name: {
            "mean": (total / counts[name]).tolist(),
            "std": (squares / counts[name] - (total / counts[name]).square()).clamp_min(0).sqrt().tolist(),
            "min": low.tolist(),
            "max": high.tolist(),
        }
        for name, (total, squares, low, high) in moments.items()
    }


@torch.no_grad()
def compare(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    chat: bool = False,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[dict[str, str]]:
    """Continue prompts without and with the adapter.

    Args:
        model: a transformers model with an adapter; it is left in evaluation mode with the adapter at work.
        chat: wrap prompts in the chat template.
        temperature: 0 takes the likeliest token each time; above 0 tokens are drawn, from ``seed``.

    Returns:
        ``prompt``, ``base`` and ``adapted`` for each prompt.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise ValueError(f"need max_new_tokens >= 1 and temperature >= 0, got {max_new_tokens} and {temperature}")
    model.eval()
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    how: dict[str, Any] = {
        "do_sample": temperature > 0,
        "temperature": temperature or None,
        "top_p": None,
        "top_k": None,
    }

    def answer(prompt: str) -> str:
        ids = torch.tensor([encode_prompt(prompt, tokenizer, chat=chat)], device=model.device)
        torch.manual_seed(seed)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        limits = {"max_new_tokens": max_new_tokens, "eos_token_id": sorted(ends), "pad_token_id": pad}
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **limits, **how)
        return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()

    answers = []
    for prompt in prompts:
        with without_adapters(model):
            base = answer(prompt)
        answers.append({"prompt": prompt, "base": base, "adapted": answer(prompt)})
    return answers


@contextmanager
def without_adapters(model: Any) -> Any:
    """The bare model for a while."""
    model.disable_adapters()
    try:
        yield model
    finally:
        model.enable_adapters()


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


def _layers(model: nn.Module, adapter_name: str) -> list[tuple[str, IdLoraLayer]]:
    return [
        (name.removeprefix(PREFIX), module)
        for name, module in model.named_modules()
        if isinstance(module, IdLoraLayer) and adapter_name in module.idlora_B
    ]


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
