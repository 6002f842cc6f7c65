"""What the router does: ``a_i`` of every adapted layer on held-out rows, for each task."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from idlora_ext.layer.layer import IdLoraLayer

from .tasks import Part

ROWS = 2  # of each task


class AlphaStatistics:
    """Of a model without ID-LoRA it finds nothing."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers = [layer for layer in model.modules() if isinstance(layer, IdLoraLayer)]

    @torch.no_grad()
    def measure(self, parts: dict[str, Part], device: str) -> dict[str, dict[str, float]]:
        """For each task, medians over layers (a few layers have outlier tokens that a mean would consist of):

        ``mean`` of ``a_i`` over tokens and clusters, ``size`` (mean ``|a_i|``), ``spread`` (standard deviation over
        tokens, mean over clusters) and ``clusters`` (standard deviation over clusters of their means); and ``largest``,
        the greatest ``|a_i|`` of all.
        """
        if not self.layers:
            return {}
        self.model.eval()
        return {name: self._measure(part.held_out[:ROWS, 0].to(device)) for name, part in parts.items()}

    def _measure(self, ids: Tensor) -> dict[str, float]:
        found: list[Tensor] = []

        def note(layer: Any, args: tuple[Tensor, ...]) -> None:
            found.append(layer.alpha(args[0]).flatten(0, -2))

        hooks = [layer.register_forward_pre_hook(note) for layer in self.layers]
        try:
            self.model(input_ids=ids)
        finally:
            for hook in hooks:
                hook.remove()
        median = statistics.median
        return {
            "mean": median(a.mean().item() for a in found),
            "size": median(a.abs().mean().item() for a in found),
            "spread": median(a.std(0).mean().item() for a in found),
            "clusters": median(a.mean(0).std(correction=0).item() for a in found),
            "largest": max(a.abs().max().item() for a in found),
        }
