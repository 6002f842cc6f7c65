"""What an adapter is made of and what it does: layers, chosen rows, router weights."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from .. import lifecycle
from ..layer.layer import IdLoraLayer
from ..rows.selection import CLUSTERED
from ..tuner.files import read_config, read_tensors
from ..tuner.names import adapted_layers, clean
from ..tuner.verify import HOLDER
from .data import encode, read_examples
from .generation import load_adapted


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
    lifecycle.apply(empty, progress=False, **fields)
    summary = lifecycle.summary(empty)
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


def _read_layers(file: Path) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(file).items():
        name, holder, kind = clean(key).rpartition(HOLDER)
        if holder:
            found.setdefault(name, {})[kind] = tensor
    if not found:
        raise ValueError(f"{file}: not an ID-LoRA adapter (no tensor is called ...{HOLDER}...)")
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
    for name, layer in adapted_layers(model, adapter_name).items():
        W, index = layer.get_base_weight().float(), layer.idlora_adapter[adapter_name].index.long()
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
        for name, layer in adapted_layers(model, adapter_name).items()
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
