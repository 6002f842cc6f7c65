"""NVTX ranges for Nsight Systems and Nsight Compute, and the shapes a model really runs. Off by default."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .layer.layer import IdLoraLayer
from .ops.nvtx import nvtx_ranges

__all__ = ["captured_shapes", "nvtx_ranges"]


@contextmanager
def captured_shapes(model: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """Collect what every adapted layer of a model is called with, for ``benchmarks/profile_nsight.py --capture``::

        with idlora_ext.profiling.captured_shapes(model) as shapes:
            model(**batch)
        Path("shapes.json").write_text(json.dumps(shapes))

    Not for a compiled model: run the model it was made from.

    Returns:
        A list that fills as layers run, each with each set of sizes once: ``layer``, ``N``, ``d``, ``k``, ``r``, ``s``,
        ``shared_router``, ``static_router``, ``bounded``, ``row_scale`` (whether there is one), ``dtype`` of the
        activation, ``router_dtype`` and ``B_dtype``.
    """
    shapes: list[dict[str, Any]] = []

    def record(module: IdLoraLayer, args: Any, y: Tensor) -> None:
        for adapter in module.adapters_at_work():
            index, router, B = adapter.tensors(y.dtype)
            d, (k, r) = y.shape[-1], index.shape
            shape = {"layer": module.name, "N": y.numel() // d, "d": d, "k": k, "r": r, "s": d // B.shape[0]}
            shape |= {"shared_router": router.shape[0] == 1, "static_router": router.ndim == 1}
            shape |= {"bounded": adapter.bounded, "row_scale": adapter.row_scale is not None}
            for key, tensor in (("dtype", y), ("router_dtype", router), ("B_dtype", B)):
                shape[key] = str(tensor.dtype).removeprefix("torch.")
            if shape not in shapes:
                shapes.append(shape)

    hooks = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, IdLoraLayer)]
    try:
        yield shapes
    finally:
        for hook in hooks:
            hook.remove()
