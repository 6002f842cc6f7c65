"""What autograd holds on to for a backward pass, counted in its own storages."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


class Saved(NamedTuple):
    """What is kept for a backward pass."""

    values: float
    bytes: float

    def minus(self, other: Saved) -> Saved:
        return Saved(self.values - other.values, self.bytes - other.bytes)

    def per(self, tokens: int) -> Saved:
        return Saved(self.values / tokens, self.bytes / tokens)


def saved_activations(module: nn.Module, *args: Any, **kwargs: Any) -> Saved:
    """Sizes of all storages that ``module(*args, **kwargs)`` saves for backward, each counted once and whole.

    Left out are parameters, buffers and the arguments: they are there without a backward pass too.
    """
    kept: dict[int, Tensor] = {}  # holds the tensors: an address freed during the pass could be given out again

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(_address(tensor), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(*args, **kwargs)
    for tensor in (*module.parameters(), *module.buffers(), *tree_leaves((args, kwargs))):
        if isinstance(tensor, Tensor):
            kept.pop(_address(tensor), None)
    sizes = [(tensor.untyped_storage().nbytes(), tensor.itemsize) for tensor in kept.values()]
    return Saved(sum(nbytes // itemsize for nbytes, itemsize in sizes), sum(nbytes for nbytes, _ in sizes))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
