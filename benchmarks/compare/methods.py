"""The methods: what each is made of, where its learning rate lives, and how a model is adapted with it.

All sit on every linear layer but the output head. The LoRA family has ``lora_alpha = 2 r`` as in PEFT's
``method_comparison`` (rsLoRA: 16, with its own ``alpha / sqrt(r)``); the others have PEFT's defaults where nothing
is said. Settings of ID-LoRA are written out, so that moving a default does not change an experiment.
"""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import idlora_ext
from idlora_ext.layer.layer import IdLoraLayer

from .hydralora import apply_hydralora
from .objectives import classifies

LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # learning rates, about half a decade apart
Adapter = dict[str, Any]  # "kind" and the arguments of that kind


@dataclass(frozen=True)
class Method:
    """``centre``: the middle of the three learning rates that are tried first."""

    adapter: Adapter
    centre: float = 1e-3


def _lora(r: int, kind: str = "LoraConfig", alpha: int | None = None, **fields: Any) -> Adapter:
    return {"kind": kind, "r": r, "lora_alpha": alpha or 2 * r, **fields}


def _idlora(r: int, **fields: Any) -> Adapter:
    """ID-LoRA with the paper's settings but for the rank, and but for ``fields``."""
    paper = {"num_clusters": 4, "rank_boost": 2, "scaling": 1.0, "router": "linear", "shared_router": True}
    return {"kind": "IdLoraConfig", "r": r, **paper, "selection": "nearest", "center": False, **fields}


BUDGETS = Path(__file__).parent / "budget.json"  # model -> layer -> rank, for as many parameters; written by budget.py


def _budgets() -> dict[str, int]:
    """The ranks of all models: their layers have different names."""
    return {layer: rank for ranks in json.loads(BUDGETS.read_text()).values() for layer, rank in ranks.items()}


METHODS: dict[str, Method] = {
    "none": Method({"kind": "none"}),
    "lora-r8": Method(_lora(8)),
    "lora-r4": Method(_lora(4)),
    "miss-r8": Method({"kind": "MissConfig", "r": 8}),
    "idlora-r32": Method(_idlora(32)),
    "idlora-r32-static": Method(_idlora(32, router="static")),
    "idlora-r32-centered": Method(_idlora(32, router="static", center=True)),
    "idlora-r32-bounded": Method(
        _idlora(32, router="bounded", center=True, selection="pivoted_qr_whole", row_scale=True)
    ),
    "lora-fa-r8": Method(_lora(8, kind="LoRA-FA")),
    "idlora-r128": Method(_idlora(128)),
    "idlora-r128-static": Method(_idlora(128, router="static")),
    "idlora-r128-centered": Method(_idlora(128, router="static", center=True), centre=3e-4),
    "miss-r32": Method({"kind": "MissConfig", "r": 32}),
    "lora-r32": Method(_lora(32)),
    "hydralora-r4": Method({"kind": "HydraLoRA", "r": 4, "experts": 3, "alpha": 8}),
    "full": Method({"kind": "full"}, centre=3e-5),
    "lora-fa-r32": Method(_lora(32, kind="LoRA-FA")),
    "dora-r8": Method(_lora(8, use_dora=True)),
    "rslora-r32": Method(_lora(32, alpha=16, use_rslora=True)),
    "vera-r256": Method({"kind": "VeraConfig", "r": 256}, centre=1e-2),
    "lily-r32": Method({"kind": "LilyConfig", "r": 32, "stride_A": 4, "num_B": 8}),
    "randlora-r32": Method({"kind": "RandLoraConfig", "r": 32}, centre=1e-3),
    "idlora-r32-budget": Method(_idlora(32, router="static", center=True, rank_pattern=_budgets())),
    "idlora-r32-pivoted": Method(
        _idlora(32, router="static", center=True, selection="pivoted_qr_whole", row_scale=True)
    ),
}


def config(adapter: Adapter, task_type: str = "CAUSAL_LM") -> peft.PeftConfig | None:
    """The PEFT configuration of an adapter; None of those that are not PEFT's.

    Raises:
        ValueError: this version has no such method or setting; the message names it.
    """
    fields = dict(adapter)
    kind = fields.pop("kind")
    if kind in ("none", "full", "HydraLoRA"):
        return None
    name = "LoraConfig" if kind == "LoRA-FA" else kind
    if kind == "IdLoraConfig":
        fields = {"row_scale": False} | fields  # results name it only where it is True: they are older than the option
    make = getattr(idlora_ext if name == "IdLoraConfig" else peft, name, None)
    if make is None:
        raise ValueError(f"peft {peft.__version__} has no {name}")
    try:
        return make(task_type=task_type, target_modules="all-linear", **fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} does not take these settings: {error}") from error


def apply(model: nn.Module, adapter: Adapter) -> nn.Module:
    """Adapt ``model`` in place; what is returned is to be called in its stead. Only what is trained needs gradients."""
    settings = config(adapter, "SEQ_CLS" if classifies(model) else "CAUSAL_LM")  # trains the new classifier as well
    if settings is not None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*layers are too narrow")  # the parameters are counted
            warnings.filterwarnings("ignore", message=".*rank_pattern keys did not match")  # other models' budgets
            model = peft.get_peft_model(model, settings)
        if ranks := adapter.get("rank_pattern"):
            layers = [module.name for module in model.modules() if isinstance(module, IdLoraLayer)]
            if others := [name for name in layers if name not in ranks]:
                raise ValueError(
                    f"{BUDGETS.name} is of another model, it has no rank for {others[0]}: run "
                    "python -m benchmarks.compare.budget --model DIRECTORY first"
                )
        return model
    if adapter["kind"] == "HydraLoRA":
        return apply_hydralora(model, adapter["r"], adapter["experts"], adapter["alpha"])
    return model.requires_grad_(adapter["kind"] == "full")


def optimizer(model: nn.Module, adapter: Adapter, lr: float) -> torch.optim.Optimizer:
    """AdamW without weight decay for everyone; LoRA-FA has its own form of it, which also freezes ``A``."""
    if adapter["kind"] == "LoRA-FA":
        from peft.optimizers import create_lorafa_optimizer

        return create_lorafa_optimizer(model, r=adapter["r"], lora_alpha=adapter["lora_alpha"], lr=lr)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0)


def behaviour(adapter: Adapter) -> list[float]:
    """What the code of an adapter computes: losses of four steps on a small fixed model.

    Results stay valid when code is moved or gains options, and become stale when it computes something else.
    """
    if adapter["kind"] == "none":
        return []
    with torch.random.fork_rng():
        set_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 64, "num_hidden_layers": 2}
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
        rows = torch.randint(0, 64, (2, 16))
        model = apply(model, adapter)
        # Each method moves at a rate of its own; this one is far from both no change and divergence for all.
        steps = optimizer(model, adapter, lr=3e-3)
        losses = []
        for _ in range(4):
            loss = model(input_ids=rows, labels=rows).loss
            losses.append(loss.item())
            loss.backward()
            steps.step()
            steps.zero_grad()
        return losses


def same_behaviour(one: list[float], other: list[float]) -> bool:
    """Equal up to what another machine or kernel may round differently."""
    return len(one) == len(other) and all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(one, other, strict=True))
