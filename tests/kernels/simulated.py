"""Runs cases on simulated GPUs: one process for each device and order of warps and blocks, all checks on."""

from __future__ import annotations

import atexit
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from harness import kernel_library
from torch import Tensor

from tests.kernels import cases
from tests.kernels.cases import Case


class Setting(NamedTuple):
    device: str
    schedule: str  # order in which the warps of a block run
    cta_order: str  # order in which the blocks of a launch run


SETTINGS = [
    Setting(device, *orders)
    for device in ("sm_90", "sm_80")
    for orders in (("forward", "forward"), ("reverse", "reverse"), ("random:1", "random:2"))
]


@dataclass
class Result:
    """What a case gave: the tensors it wrote, and the mangled names of the kernels that ran."""

    outputs: list[Tensor]
    kernels: list[str]


@cache
def library() -> Path:
    return kernel_library.build(80, 90)


def settings_of(case: Case) -> list[Setting]:
    """All; for a case with so many tokens that it takes seconds one alone."""
    return SETTINGS if case.N < cases.MANY else [Setting("sm_90", "reverse", "reverse")]


@cache
def run(case: Case) -> dict[Setting, Result]:
    """The case under every setting, as many at a time as there are cores. A finding is an exception."""
    library()  # built before several threads ask for it
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        settings = settings_of(case)
        results = threads.map(lambda setting: _process(setting).submit(_execute, case).result(), settings)
        return {
            setting: Result([_tensor(*o) for o in outputs], kernels)
            for setting, (outputs, kernels) in zip(settings, results, strict=True)
        }


@cache
def _process(setting: Setting) -> ProcessPoolExecutor:
    executor = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start, (setting, library()))
    atexit.register(executor.shutdown, cancel_futures=True)
    return executor


# ---- in the process of one setting -----------------------------------------------------------------------------------

_kernels: kernel_library.Kernels


def _start(setting: Setting, path: Path) -> None:
    global _kernels
    os.environ |= {
        "PTXSIM_DEVICE": setting.device,
        "PTXSIM_SCHEDULE": setting.schedule,
        "PTXSIM_CTA_ORDER": setting.cta_order,
        "PTXSIM_CHECKS": "1",
        "PTXSIM_STRICT": "1",
    }
    torch.set_num_threads(1)
    _kernels = kernel_library.Kernels(path)


def _execute(case: Case) -> tuple[list[tuple[np.ndarray, str]], list[str]]:
    arguments = cases.inputs(case)
    if case.op in cases.TENSOR_VARIANTS:
        arguments["variant"] = case.variant
    if case.op == "adapt":
        arguments["keep_x"] = case.keep_x
    outputs = getattr(_kernels, case.op)(**arguments)
    outputs = [outputs] if isinstance(outputs, Tensor) else [t for t in outputs if t is not None]
    # As bytes: torch would hand tensors over in shared memory.
    plain = [(t.flatten().view(torch.uint8).numpy(), str(t.dtype).removeprefix("torch.")) for t in outputs]
    return plain, [launch["mangled"] for launch in _kernels.launches]


def _tensor(data: np.ndarray, dtype: str) -> Tensor:
    kind = getattr(torch, dtype)
    tensor = torch.empty(data.size // kind.itemsize, dtype=kind)
    tensor.view(torch.uint8).copy_(torch.from_numpy(data))
    return tensor
