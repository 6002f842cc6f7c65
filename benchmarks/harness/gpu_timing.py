"""Times on a real GPU: CUDA events around one call at a time, caches flushed before it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from idlora_ext.ops.default_kernels import default_kernels

from . import modelled
from .limits import backward_limit, forward_limit
from .modelled import Shape

ROUNDS = 50


def measure(shape: Shape, phase: str) -> dict[str, Any]:
    """Microseconds of ours, of the package's default kernels and of what PEFT's LoRA r=32 adds; ours verified first."""
    problem = modelled.problem(shape)
    t = {name: tensor.cuda() for name, tensor in problem.items()}
    adapter = (t["index"], t["router"], t["B"])
    y, x = torch.ops.idlora.adapt(t["y0"], *adapter, save_x=True)
    if phase == "forward":
        modelled.verify_forward(problem, y.cpu(), x.cpu())
        limit = forward_limit(*shape, 2, 2, 2, training=True)
        runs = {
            "ours": lambda: torch.ops.idlora.adapt(t["y0"], *adapter, save_x=True),
            "default kernels": lambda: default_kernels["adapt"](t["y0"], *adapter, None, 1.0, save_x=True),
        }
    else:
        gradients = torch.ops.idlora.adapt_backward(t["dy"], x, *adapter, 1.0)
        modelled.verify_backward(problem, *(g.cpu() for g in gradients))
        limit = backward_limit(*shape, 2, 2, 2)
        runs = {
            "ours": lambda: torch.ops.idlora.adapt_backward(t["dy"], x, *adapter, 1.0),
            "default kernels": lambda: default_kernels["adapt_backward"](t["dy"], x, *adapter, 1.0),
        }
    times = _microseconds(runs | _lora(shape, phase, t))
    times["PEFT LoRA r=32"] = [a - b for a, b in zip(times.pop("lora"), times.pop("frozen"), strict=True)]
    spread = {name: _spread(values) for name, values in times.items()}
    rate = limit / spread["ours"]["median"] / 1e3
    return {
        "shape": str(shape),
        "phase": phase,
        "microseconds": spread,
        "limit_bytes": limit,
        "gb_per_s": rate,
        "percent_of_copy": 100 * rate / copy_rate()["median"],
    }


def _lora(shape: Shape, phase: str, t: dict[str, Tensor]) -> dict[str, Callable[[], Any]]:
    """PEFT's module around a square frozen layer, and the layer alone."""
    frozen = nn.Linear(shape.d, shape.d, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    layer = inject_adapter_in_model(LoraConfig(r=32, target_modules=["0"]), nn.Sequential(frozen)).to(torch.bfloat16)
    h = t["y0"].clone().requires_grad_()
    trainable = [h, *(p for p in layer.parameters() if p.requires_grad)]
    if phase == "forward":
        return {"lora": lambda: layer(h), "frozen": lambda: frozen(h)}
    y, y0 = layer(h), frozen(h)
    return {
        "lora": lambda: torch.autograd.grad(y, trainable, t["dy"], retain_graph=True),
        "frozen": lambda: torch.autograd.grad(y0, [h], t["dy"], retain_graph=True),
    }


@cache
def copy_rate() -> dict[str, float]:
    """GB/s of a copy within the device, read and write both counted."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return _spread([2 * a.nbytes / us / 1e3 for us in _microseconds({"copy": lambda: b.copy_(a)})["copy"]])


def _microseconds(runs: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Of each, in turns."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    flush = torch.empty(4 * l2, dtype=torch.uint8, device="cuda")
    for run in runs.values():
        for _ in range(3):
            run()
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            run()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [1e3 * start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}


def _spread(values: list[float]) -> dict[str, float]:
    p20, median, p80 = (
        torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    )
    return {"median": median, "p20": p20, "p80": p80}
