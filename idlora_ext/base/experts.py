"""Experts that transformers 5 keeps as fused 3-D parameters, opened into one linear layer an expert, as views.

A module such as ``Qwen3MoeExperts`` holds ``gate_up_proj [E, 2f, h]`` and ``down_proj [E, h, f]`` and runs the products
itself, so there is no layer whose output an adapter could follow. :class:`UnfusedExperts` takes its place, calls one
linear layer an expert and product, and leaves all else (gate, activation, bias, layout) to the module it holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .peft_internals import BaseTunerLayer

FUSED_FROM = {"gate_up_proj": ("gate_proj", "up_proj", "w1", "w3"), "down_proj": ("w2",)}  # names in transformers 4


class ExpertLinear(nn.Linear):
    """``h W_e^T + b_e``: one expert's product. ``W_e [d, d_in]`` and ``b_e [d]`` are views; nothing is copied."""

    def __init__(self, experts: nn.Module, parameter: str, expert: int) -> None:
        nn.Module.__init__(self)
        self._source = (experts, parameter, expert)  # in a tuple, or it would be registered as a child
        self.out_features, self.in_features = self.weight.shape

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        experts, parameter, expert = self._source
        weight: Tensor = getattr(experts, parameter)[expert]
        return weight.t() if experts.is_transposed else weight

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        experts, parameter, expert = self._source
        return getattr(experts, parameter + "_bias")[expert] if experts.has_bias else None


class UnfusedExperts(nn.Module):
    """``y_n = sum_e w_ne E_e(h_n)`` over the experts a token ``n`` is routed to, expert by expert.

    Children ``"0"`` to ``"E-1"`` hold the :class:`ExpertLinear` layers, under the names of the fused parameters;
    ``base_layer`` is the original module, which owns the weights and runs as it always did while no adapter is active.
    """

    def __init__(self, base_layer: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        for expert in range(base_layer.num_experts):
            products = {name: ExpertLinear(base_layer, name, expert) for name in _products(base_layer)}
            self.add_module(str(expert), nn.ModuleDict(products))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "base_layer" and isinstance(value, BaseTunerLayer):  # PEFT puts one around a parameter
            raise ValueError(
                f"{type(value.get_base_layer()).__qualname__}: its experts are open for ID-LoRA, so another adapter "
                "cannot have their fused parameters (target_parameters). Leave the experts to one of the two: name "
                'other target_parameters, or make the ID-LoRA adapter with exclude_modules=["experts"].'
            )
        super().__setattr__(name, value)

    def get_base_layer(self) -> nn.Module:
        """The original module, as PEFT's ``unload`` asks for it."""
        base: nn.Module = self.base_layer
        return base

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What PEFT calls on a module that holds adapted layers, in ``unload`` and ``merge_and_unload``."""
        for module in self.modules():
            if merge and isinstance(module, BaseTunerLayer):
                module.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.get_base_layer()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``hidden_states [N, h]``, ``top_k_index [N, top_k]`` and ``top_k_weights [N, top_k]`` to ``[N, h]``.

        While training every expert is called, those without a token too: each parameter then gets a gradient, zero
        where there is nothing to learn, as DistributedDataParallel needs it.
        """
        if not self._adapted() or not len(hidden_states):
            return self.base_layer(hidden_states, top_k_index, top_k_weights)
        chosen = top_k_index.flatten()
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=self.base_layer.num_experts).tolist()
        outputs = [
            self._expert(str(expert), h)
            for expert, h in enumerate(hidden_states[order // top_k_index.shape[-1]].split(counts))
            if len(h) or torch.is_grad_enabled()
        ]
        routed = torch.cat(outputs) * top_k_weights.flatten()[order, None]
        in_order = torch.empty_like(routed).index_copy(0, order, routed)
        return in_order.view(*top_k_index.shape, -1).sum(-2).to(hidden_states.dtype)

    def _expert(self, expert: str, h: Tensor) -> Tensor:
        base, products = self.base_layer, self._modules[expert]
        first, last = _products(base)
        h = products[first](h)  # type: ignore[index]
        h = products[last](base._apply_gate(h) if base.has_gate else base.act_fn(h))  # type: ignore[index]
        return base.post_expert_norm(h) if base.has_post_expert_norm else h

    def _adapted(self) -> bool:
        layers = (m for m in self.modules() if isinstance(m, BaseTunerLayer))
        return any(
            not m.disable_adapters and {*m.active_adapters} & {*m._all_available_adapter_names()} for m in layers
        )


def _products(experts: Any) -> tuple[str, str]:
    """The parameters of an expert's two products, in order."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def can_unfuse(module: nn.Module) -> bool:
    """Whether a module is one of transformers' fused experts, and its weights can be read as they are."""
    # What transformers' decorator `use_experts_implementation` puts on a module, for its own implementations to read.
    marks = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_is_expert_parallel", "num_experts")
    if not all(hasattr(module, mark) for mark in marks) or module._is_expert_parallel:
        return False
    # Hooks and a replaced forward (tensor parallelism's all-reduce, offloading) would be passed by.
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return False
    weights = [module._parameters.get(name) for name in _products(module)]
    return all(w is not None and w.ndim == 3 and w.dtype.itemsize >= 2 for w in weights)


def fused_parameters(module: nn.Module) -> dict[str, int]:
    """Parameters that look like the weights of several linear layers in one, and of how many.

    They are 3-D, or packed integers of more dimensions, and not of a module of torch's own, such as a convolution.
    """
    if type(module).__module__.startswith("torch.nn.") or isinstance(module, BaseTunerLayer):
        return {}
    found = {}
    for name, parameter in module.named_parameters(recurse=False):
        shape = getattr(parameter, "ds_shape", parameter.shape)  # DeepSpeed ZeRO-3 leaves an empty stub
        if min(shape, default=0) > 1 and (len(shape) == 3 or (len(shape) > 3 and not parameter.is_floating_point())):
            found[name] = shape[0]
    return found
