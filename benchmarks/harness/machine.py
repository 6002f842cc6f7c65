"""The machine of a benchmark: what it is, to go into the results beside the numbers, and how it keeps memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "peft", "numpy")


def describe() -> dict[str, Any]:
    """Processor, cores, memory, accelerators, operating system, versions, and the threads torch uses."""
    return {
        "cpu": _first("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "os": _operating_system(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
    }


def keep_freed_memory() -> None:
    """Have glibc keep what is freed: large tensors would otherwise come from the system anew, page by page."""
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _operating_system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):  # not a Linux distribution
        return f"{platform.system()} {platform.release()}"


def _first(file: str, key: str) -> str | None:
    """The value of the first ``key: value`` line of a Linux information file; None where there is no such file."""
    path = Path(file)
    lines = path.read_text().splitlines() if path.is_file() else []
    return next(
        (value.strip() for name, _, value in (line.partition(":") for line in lines) if name.strip() == key), None
    )


def _memory_gib() -> float | None:
    total = _first("/proc/meminfo", "MemTotal")  # "24609672 kB"
    return None if total is None else round(int(total.split()[0]) / 2**20, 1)
