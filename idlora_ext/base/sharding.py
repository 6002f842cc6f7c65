"""Several processes: whole tensors from sharded ones, and what ranks tell one another.

Whoever adds an adapter while ``torch.distributed`` is initialised does so on every rank, as with any collective
operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

if dist.is_available():
    from torch.distributed.tensor import DTensor, Replicate, Shard
else:  # a build of torch without it: then nothing is ever sharded
    DTensor = type("DTensor", (), {})  # type: ignore[assignment, misc]


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_sharded(weight: Tensor) -> bool:
    """Whether reading the whole of ``weight`` takes all ranks: FSDP2, tensor parallelism, DeepSpeed ZeRO-3."""
    return isinstance(weight, DTensor) or hasattr(weight, "ds_shape")


def read_whole(parameter: Tensor, read: Callable[[], Tensor]) -> Tensor:
    """What ``read`` returns of ``parameter``, gathered: every rank must call this if ``parameter`` is sharded."""
    if hasattr(parameter, "ds_shape"):  # DeepSpeed ZeRO-3: shape [0] outside of this context
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None):
            return read().detach().clone()
    weight: Any = read()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor of a state dictionary, gathered: every rank must call this if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def unsupported(layer: Any, dropout: float) -> str | None:
    """Why a layer whose weight is not whole cannot be adapted, or None."""
    weight = getattr(layer, "weight", None)
    if isinstance(weight, DTensor):
        # ("fsdp",): transformers' own sharding on loading, whose Trainer keeps adapters that come later in step.
        if weight.device_mesh.mesh_dim_names not in (("tp",), ("fsdp",)):
            return "already sharded by FSDP: add the adapter first, so that it is sharded with its layer"
        if any(type(placement) not in (Shard, Replicate) for placement in weight.placements):
            return f"its rows are dealt out to the ranks out of order: {weight.placements}"
        if dropout and weight.device_mesh.mesh_dim_names == ("tp",):
            return "tensor-parallel: dropout would differ between ranks and must be 0"
    elif isinstance(weight, Tensor) and weight.numel() == 0 and not hasattr(weight, "ds_shape"):
        return f"its weight has shape {list(weight.shape)}: partitioned, and not by DeepSpeed, which could gather it"
    return None


@contextmanager
def gathered(model: nn.Module, prefix: str) -> Iterator[None]:
    """Inside, parameters with ``prefix`` in their names that DeepSpeed ZeRO-3 has partitioned are whole."""
    partitioned = [p for name, p in model.named_parameters() if prefix in name and hasattr(p, "ds_shape")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=None):
        yield


def exchange(value: Any) -> list[Any]:
    """The values of all ranks, by rank."""
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_first_rank(work: Callable[[], None]) -> None:
    """Do ``work`` on rank 0; all ranks wait for it, and raise if it does.

    Raises:
        OSError: on the other ranks, whatever rank 0 raised.
    """
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            work()
        except Exception as caught:
            error = caught
    message = exchange(error and str(error))[0]
    if error is not None:
        raise error
    if message is not None:
        raise OSError(f"rank 0: {message}")


# ---- column-parallel layers ------------------------------------------------------------------------------------------


def local(tensor: Tensor | None) -> Tensor | None:
    """This rank's part of a bias; a bias that is not sharded as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
