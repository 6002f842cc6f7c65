"""HydraLoRA in plain PyTorch, as fast as its equation allows: one product with all experts, no loop over them.

``y = y0 + scaling * sum_i w_i B_i (A h)``, ``w = softmax(G h)``, which is one product with the concatenated experts:
``y = y0 + scaling * [w_1 a, ..., w_E a] [B_1, ..., B_E]^T``, ``a = A h``.

Source: arXiv 2404.19245, eq. 4 and 5. ``A`` starts as LoRA's, the ``B_i`` at zero, the gate ``G`` as a linear layer's.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HydraLinear(nn.Module):
    """A frozen linear layer with one ``A [r, d_in]``, ``experts`` matrices in ``B [d, E * r]``, and ``G [E, d_in]``.

    ``h [..., d_in]`` to ``[..., d]``. ``scaling`` is ``alpha / r``, as LoRA's.
    """

    def __init__(self, base_layer: nn.Linear, r: int, experts: int, alpha: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.scaling = alpha / r
        options = {"device": base_layer.weight.device, "dtype": torch.float32}
        self.hydra_A = nn.Parameter(torch.empty(r, base_layer.in_features, **options))
        self.hydra_B = nn.Parameter(torch.zeros(base_layer.out_features, experts * r, **options))
        self.hydra_gate = nn.Parameter(torch.empty(experts, base_layer.in_features, **options))
        for parameter in (self.hydra_A, self.hydra_gate):
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))

    def forward(self, h: Tensor) -> Tensor:
        y0 = self.base_layer(h)
        h = h.to(self.hydra_A.dtype)
        a = F.linear(h, self.hydra_A)
        w = F.linear(h, self.hydra_gate).softmax(-1)
        weighted = (w.unsqueeze(-1) * a.unsqueeze(-2)).flatten(-2)  # [..., E * r]
        return y0 + (self.scaling * F.linear(weighted, self.hydra_B)).to(y0.dtype)


def apply_hydralora(model: nn.Module, r: int, experts: int, alpha: float) -> nn.Module:
    """Freeze ``model`` and put the adapter on every linear layer but the output head, in place."""
    head = model.get_output_embeddings()
    model.requires_grad_(False)
    targets = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head]
    if not targets:
        raise ValueError("HydraLoRA: the model has no torch.nn.Linear beside its output head (GPT-2's Conv1D is none)")
    for name in targets:
        model.set_submodule(name, HydraLinear(model.get_submodule(name), r, experts, alpha))
    return model
