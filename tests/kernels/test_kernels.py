"""Every CUDA kernel against the paper's equations in float64, on simulated GPUs and, where there is one, on a real one."""

from __future__ import annotations

import math
import subprocess
from typing import Any

import pytest
import torch
from harness import kernel_library
from torch import Tensor

from idlora_ext import reference
from tests.kernels import cases, simulated
from tests.kernels.cases import CASES, Case

pytestmark = pytest.mark.simulator

NATIVE = torch.cuda.is_available() and torch._C._dispatch_has_kernel_for_dispatch_key("idlora::adapt", "CUDA")
needs_gpu = pytest.mark.skipif(
    not NATIVE, reason="no GPU" if not torch.cuda.is_available() else "idlora_ext was built without CUDA kernels"
)
needs_simulator = pytest.mark.skipif(kernel_library.missing() is not None, reason=f"{kernel_library.missing()}")


@needs_simulator
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_the_simulator(case):
    """No finding under any schedule; the outputs are exact enough and the same, bit for bit, whatever the order."""
    results = simulated.run(case)
    for device in {setting.device for setting in results}:
        first, *others = [result for setting, result in results.items() if setting.device == device]
        for other in others:
            assert other.kernels == first.kernels
            assert all(_same_bits(a, b) for a, b in zip(other.outputs, first.outputs, strict=True)), (
                "depends on the order"
            )
        check_accuracy(case, first.outputs)


@pytest.mark.parametrize("case", [case for case in CASES if case.outlier and case.op == "adapt"], ids=str)
def test_outliers_take_z_out_of_the_range_of_float16(case):
    """So that the cases deserve their name."""
    a = cases.inputs(case)
    x = _gathered(a["y0"], a["index"], None, None)
    (z,) = _plain("rb_scale", {"x": x} | {name: a[name] for name in ("router", "bounded", "center")}, torch.float64)
    assert z.abs().max() > torch.finfo(torch.float16).max


@needs_gpu
@pytest.mark.parametrize("case", dict.fromkeys(c for c in CASES if c.variant == "automatic" or c.outlier), ids=str)
def test_on_the_gpu(case):
    first, second = _run_on_gpu(case), _run_on_gpu(case)
    assert all(_same_bits(a, b) for a, b in zip(first, second, strict=True)), "two runs differ"
    check_accuracy(case, first)


@needs_simulator
def test_every_kernel_that_ships_was_executed():
    shipped = kernel_library.entries(simulated.library())
    executed: dict[str, set[str]] = {}
    for case in CASES:
        for setting, result in simulated.run(case).items():
            executed.setdefault(setting.device, set()).update(result.kernels)
    assert executed.keys() <= shipped.keys()
    for device, kernels in executed.items():
        assert shipped[device], "no kernels found in the library"
        assert not shipped[device] - kernels, f"never executed on {device}"


@needs_simulator
@pytest.mark.parametrize("source", sorted(p.name for p in (kernel_library.ROOT / "csrc" / "cuda").glob("*.cu")))
def test_compiles_for_sm_75(source, tmp_path):
    nvcc = simulated.kernel_library.simulator().nvcc()
    command = [
        nvcc,
        "-std=c++17",
        "-arch=compute_75",
        "-ptx",
        "-I",
        "csrc",
        f"csrc/cuda/{source}",
        "-o",
        tmp_path / "o",
    ]
    done = subprocess.run(command, cwd=kernel_library.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def check_accuracy(case: Case, outputs: list[Tensor]) -> None:
    """Error against float64 at most 2x (gradients 3x) that of the same maths in the same dtype in plain PyTorch.

    The largest error of a few numbers is luck, so plain PyTorch's is that of as many draws as give 64 numbers, or
    of 16.
    """
    exact, plain = _expected(case, cases.inputs(case))
    assert len(outputs) == len(exact)
    for i, (name, ours, true, theirs) in enumerate(zip(_names(case), outputs, exact, plain, strict=True)):
        assert torch.isfinite(ours).all(), name
        error, allowed = _error(ours.view(true.shape), true), _error(theirs, true)
        # With a bounded router the error is that of one weight for all of a token's numbers.
        numbers = min(case.N, true.numel()) if case.bounded and name in ("y", "dy0", "dT") else true.numel()
        draws = min(16, math.ceil(64 / max(1, numbers)))
        others = [cases.inputs(case, draw=draw) for draw in range(1, draws)]
        for other in others:
            more_exact, more_plain = _expected(case, other)
            allowed = max(allowed, _error(more_plain[i], more_exact[i]))
        allowed *= 3 if case.op == "adapt_backward" else 2
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def _error(approximate: Tensor, true: Tensor) -> float:
    return (approximate.double() - true).abs().max().item() if true.numel() else 0.0


def _names(case: Case) -> tuple[str, ...]:
    names = {"adapt": ("y", "x")[: 1 + case.keep_x], "adapt_backward": ("dy0", "dT", "dB"), "rb_scale": ("z",)}
    return names.get(case.op, ("x",) if case.op == "cluster_gather" else ("y",))


def _expected(case: Case, arguments: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """In float64, and in the case's dtype."""
    exact, plain = (_plain(case.op, arguments, dtype) for dtype in (torch.float64, getattr(torch, case.dtype)))
    return exact[: len(_names(case))], plain[: len(_names(case))]


def _plain(op: str, arguments: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """The op in plain PyTorch, all tensors in one dtype."""
    a = {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    if op == "cluster_gather":
        return [_gathered(a["y0"], a["index"], a["bias"], a["row_scale"])]
    if op == "rb_scale":
        x = reference.centred(list(a["x"].unbind(-2)), a["center"])
        alpha = [reference.alpha(x, i, a["router"], a["bounded"]) for i in range(len(x))]
        return [torch.stack([a_i * x_i for a_i, x_i in zip(alpha, x, strict=True)]).sum(0)]
    if op == "shared_gemm":
        update = torch.cat([part @ a["B"].T for part in a["z"].split(a["B"].shape[1], dim=-1)], dim=-1)
        return [(a["y0"] if a["bias"] is None else a["y0"] + a["bias"]) + a["scaling"] * update]
    if op == "adapt":
        x = _gathered(a["y0"], a["index"], a["bias"] if a["bias_in_y0"] else None, a["row_scale"])
        summed = a["bounded"] or a["router"].shape == (1,)
        return [reference.adapt(**a), reference.centred([x.sum(1)], a["center"])[0] if summed else x]
    # A y0 of zeros: only the x that was kept, which is added to what is gathered, matters to the gradients. If it is the
    # sum over the clusters, it was centred before it was kept.
    y0 = torch.zeros_like(a["dy"], memory_format=torch.contiguous_format)
    variables = [t.requires_grad_() for t in (y0, a["router"], a["B"])]
    x = _gathered(y0, a["index"], None, a["row_scale"])
    if a["x"].ndim == 3:
        x = reference.centred(list((x + a["x"]).unbind(1)), a["center"])
    else:
        x = [reference.centred([x.sum(1)], a["center"])[0] + a["x"]]
    y = y0 + a["scaling"] * reference.update(x, *variables[1:], a["bounded"])
    return list(torch.autograd.grad(y, variables, a["dy"]))


def _gathered(y0: Tensor, index: Tensor, bias: Tensor | None, row_scale: Tensor | None) -> Tensor:
    x = (y0 if bias is None else y0 - bias)[:, index.long()]
    return x if row_scale is None else x * row_scale


def _run_on_gpu(case: Case) -> list[Tensor]:
    arguments = {
        name: _to_gpu(value) if isinstance(value, Tensor) else value for name, value in cases.inputs(case).items()
    }
    if case.op == "adapt":
        arguments["save_x"] = case.keep_x
    outputs = getattr(torch.ops.idlora, case.op)(**arguments)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return [t.cpu() for t in (outputs[:1] if case.op == "adapt" and not case.keep_x else outputs)]


def _to_gpu(t: Tensor) -> Tensor:
    """With the same strides and start."""
    return t.cuda() if t._base is None else t._base.cuda().as_strided(t.shape, t.stride(), t.storage_offset())


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))
