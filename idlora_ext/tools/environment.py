"""What runs here, and why not more: versions, the native module, the kernel that serves each op on each device."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from .. import native
from ..ops.default_kernels import default_kernels
from ..version import __version__

PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "numpy")


def report() -> dict[str, Any]:
    """What ``idlora env`` prints: ``kernels[op][device]`` is ``native`` or ``default``, ``obstacles[device]`` says why
    all of a device's are ``default``, if they are.
    """
    module = native.module
    obstacles = {"cpu": _cpu_obstacle(), "cuda": _cuda_obstacle()}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {"idlora_ext": __version__} | {name: _version(name) for name in PACKAGES},
        "module": None if module is None else module.__file__,
        "build": None if module is None else module.build_info(),
        "cpu": {
            "torch": torch.backends.cpu.get_cpu_capability(),
            "native": None if module is None else module.cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "torch_cuda": torch.version.cuda,
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
        "obstacles": obstacles,
        "kernels": {
            op: {device: _kernel(op, device) if why is None else "default" for device, why in obstacles.items()}
            for op in default_kernels
        },
    }


def text(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"Python {report['python']}, {report['platform']}"]
    lines += [", ".join(f"{name} {version}" for name, version in report["packages"].items())]
    lines += ["", *_module_lines(report), "", *_device_lines(report), "", f"{'kernels':32}{'CPU':9}CUDA"]
    lines += [f"{'  ' + op:32}{on['cpu']:9}{on['cuda']}" for op, on in report["kernels"].items()]
    lines += ["", "default kernels are plain PyTorch; they serve"]
    lines += ["  always: float64, and devices other than CPU and CUDA"]
    lines += [f"  {device.upper()}: {why}" for device, why in report["obstacles"].items() if why]
    return "\n".join([*lines, "IDLORA_NATIVE=0 in the environment leaves the native module out"])


def _module_lines(report: dict[str, Any]) -> list[str]:
    build = report["build"]
    if build is None:
        return ["native module: none"]
    lines = [f"native module: {report['module']}"]
    lines += [f"  version {build['version']}, built under torch {build['torch']} by {build['compiler']}"]
    lines += [f"  flags: {build['flags']}"]
    if build["cuda"] is None:
        return [*lines, "  CUDA: no"]
    lines += [f"  CUDA: {build['cuda']['architectures']} by nvcc {build['cuda']['nvcc']}"]
    return [*lines, f"  flags: {build['cuda']['flags']}"]


def _device_lines(report: dict[str, Any]) -> list[str]:
    cpu, cuda = report["cpu"], report["torch_cuda"]
    ours = f", native kernels {cpu['native']}" if cpu["native"] else ""
    lines = [f"CPU: torch uses {cpu['torch']}{ours}, {cpu['threads']} threads"]
    if not report["gpus"]:
        return [*lines, f"GPU: none (torch is built {f'for CUDA {cuda}' if cuda else 'without CUDA'})"]
    for i, gpu in enumerate(report["gpus"]):
        obstacle = f": default kernels, {gpu['obstacle']}" if gpu["obstacle"] else ""
        lines += [f"GPU {i}: {gpu['name']}, sm_{gpu['capability']}{obstacle}"]
    return lines


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_obstacle() -> str | None:
    return native.reason and f"the native module is {native.reason}"


def _cuda_obstacle() -> str | None:
    """Why no op has a native kernel on CUDA, or None."""
    if native.module is None:
        return _cpu_obstacle()
    if native.module.build_info()["cuda"] is None:
        return "the native module was built without CUDA (IDLORA_CUDA=OFF, or no nvcc)"
    if torch.version.cuda is None:
        return "torch is a build without CUDA"
    if not torch.cuda.is_available():
        return "there is no GPU, or its driver is too old for this torch"
    obstacles = [_gpu(i)["obstacle"] for i in range(torch.cuda.device_count())]
    return obstacles[0] if all(obstacles) else None


def _gpu(index: int) -> dict[str, Any]:
    major, minor = torch.cuda.get_device_capability(index)
    unusable = getattr(native.module, "unusable", None)
    return {
        "name": torch.cuda.get_device_name(index),
        "capability": f"{major}{minor}",
        "obstacle": unusable(index) if unusable else _cpu_obstacle() or "the native module was built without CUDA",
    }


def _kernel(op: str, device: str) -> str:
    native_one = torch._C._dispatch_has_kernel_for_dispatch_key(f"idlora::{op}", device.upper())
    return "native" if native_one else "default"
