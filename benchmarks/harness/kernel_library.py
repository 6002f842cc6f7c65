"""The CUDA kernels outside torch: the library that CMake builds, called through ctypes on a simulated GPU.

`ptxsim` (folder named by the environment variable IDLORA_PTXSIM, default ``../shared/ptxsim``) runs the very launch
code and PTX that ship, on CPU tensors, with checks and counters. It reads its settings once a process, so whoever wants
another device or another order of warps starts another process with another environment:

    PTXSIM_DEVICE=sm_80 PTXSIM_SCHEDULE=random:1 python ...
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SIMULATOR = Path(os.environ.get("IDLORA_PTXSIM", ROOT.parent / "shared" / "ptxsim")).resolve()
BUILD = ROOT / "build" / "simulated"

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
VARIANTS = {"automatic": 0, "plain": 1, "prefill": 2, "decode": 3}
LINEAR, CONSTANTS, BOUNDED = range(3)  # RouterForm


def _structs() -> dict[str, type[ctypes.Structure]]:
    """The structs of csrc/idlora/problems.h, read from there."""
    types = {"int64_t": ctypes.c_int64, "double": ctypes.c_double, "float": ctypes.c_float} | dict.fromkeys(
        ("int32_t", "Dtype", "RouterForm", "Variant"), ctypes.c_int32
    )
    header = re.sub(r"//.*", "", (ROOT / "csrc" / "idlora" / "problems.h").read_text())
    structs = {}
    for name, body in re.findall(r"struct (\w+Problem) \{(.*?)\};", header, re.DOTALL):
        fields: list[tuple[str, Any]] = []
        for declared, names in re.findall(r"((?:const )?\w+\*?) ([\w, ]+);", body):
            kind = ctypes.c_void_p if declared.endswith("*") else types[declared]
            fields += [(field, kind) for field in names.split(", ")]
        structs[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return structs


STRUCTS = _structs()


def missing() -> str | None:
    """What the simulator lacks on this machine, or None."""
    if not (SIMULATOR / "ptxsim" / "ptxsim.py").is_file():
        return f"no simulator at {SIMULATOR} (IDLORA_PTXSIM names its folder)"
    if not any(map(shutil.which, (os.environ.get("NVCC", "nvcc"), "/usr/local/cuda/bin/nvcc"))):
        return "no nvcc"
    return next((f"no {tool}" for tool in ("cmake", "ninja") if _tool(tool) is None), None)


def simulator() -> ModuleType:
    """The Python module of the simulator. Its own build goes below ours: its folder may be read-only."""
    os.environ.setdefault("PTXSIM_BUILD", str(BUILD / "ptxsim"))
    if str(SIMULATOR) not in sys.path:
        sys.path.append(str(SIMULATOR))
    import ptxsim

    return ptxsim


def build(*architectures: int) -> Path:
    """Builds the kernels' library against the simulator, or brings it up to date; where it lies.

    Args:
        architectures: those that the simulator is to run, such as 80; by default all that it can.
    """
    environment = os.environ | {"PTXSIM_BUILD": os.path.dirname(simulator().build())}
    folder = BUILD / "-".join(["kernels", *map(str, architectures)])
    configure = [
        "-S",
        ROOT,
        "-B",
        folder,
        "-G",
        "Ninja",
        f"-DIDLORA_PTXSIM={SIMULATOR}",
        *([f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(f'{a}-virtual' for a in architectures)}"] if architectures else []),
        f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
    ]
    compiling = ["--build", folder, "--target", "idlora_kernels", "--parallel", str(os.cpu_count())]
    for arguments in (configure, compiling):
        command = [_tool("cmake"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"cmake {' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}")
    return folder / "libidlora_kernels.so"


def _tool(name: str) -> str | None:
    """A program beside this Python (pip installs cmake and ninja there) or on the path."""
    return shutil.which(name, path=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]))


def entries(library: Path) -> dict[str, set[str]]:
    """Architecture -> mangled names of all kernels in the library's PTX, which must not be compressed."""
    found: dict[str, set[str]] = {}
    for name, module in re.findall(rb"\.target (sm_\d+)(.*?)\0", library.read_bytes(), re.DOTALL):
        found.setdefault(name.decode(), set()).update(
            entry.decode() for entry in re.findall(rb"\.entry\s+([\w$]+)", module)
        )
    return found


class Memory:
    """Device memory: tensors that the simulator knows to the byte, between stretches it does not know.

    New memory is full of NaN (bytes 0xFF). On leaving, what was put in must be what it was.
    """

    GUARD = 1024

    def __init__(self) -> None:
        self._runtime = simulator().runtime()
        self._put: list[tuple[Tensor, Tensor]] = []
        self._registered: list[tuple[int, Tensor]] = []  # first byte, and the tensor that owns the memory

    def new(self, nbytes: int, misalignment: int = 0) -> Tensor:
        """``nbytes`` bytes that start ``misalignment`` bytes past a multiple of 256."""
        owner = torch.full((nbytes + 2 * self.GUARD + 256,), 0xFF, dtype=torch.uint8)
        start = -owner.data_ptr() % 256 + self.GUARD + misalignment
        if nbytes:
            self._runtime.ptxsim_register_host_range(owner.data_ptr() + start, nbytes)
            self._registered.append((owner.data_ptr() + start, owner))
        return owner[start : start + nbytes]

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self.new(torch.Size(shape).numel() * dtype.itemsize).view(dtype).view(shape)

    def put(self, tensor: Tensor | None) -> int | None:
        """The address of a copy with the same strides and, within 16 bytes, the same place."""
        if tensor is None or tensor.numel() == 0:
            return None
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        memory = self.new(extent * tensor.itemsize, tensor.data_ptr() % 16)
        memory.copy_(tensor.as_strided((extent,), (1,)).view(torch.uint8))
        self._put.append((memory, memory.clone()))
        return memory.data_ptr()

    def __enter__(self) -> Memory:
        return self

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for address, _ in self._registered:
            self._runtime.ptxsim_unregister(address)
        if error is None and not all(torch.equal(memory, before) for memory, before in self._put):
            raise RuntimeError("a kernel wrote to its input")


class Kernels:
    """The kernels by the names of the ops, on CPU tensors ``[N, ..]`` of any row stride.

    A finding of the simulator is an exception; ``launches`` holds the counters of the latest call.
    """

    def __init__(self, library: Path) -> None:
        self._library = simulator().load(library)
        self._library.idlora_adapt_backward_workspace.restype = ctypes.c_size_t
        self._library.idlora_sizeof.restype = ctypes.c_size_t
        self.launches: list[dict[str, Any]] = []
        for op in ("cluster_gather", "rb_scale", "shared_gemm", "adapt", "adapt_backward"):
            getattr(self._library, f"idlora_{op}").restype = ctypes.c_char_p
        for name, struct in STRUCTS.items():
            size = self._library.idlora_sizeof(name.encode())
            if size != ctypes.sizeof(struct):
                raise RuntimeError(f"{name} has {size} bytes in C++ and {ctypes.sizeof(struct)} here")

    def _call(self, op: str, problem: ctypes.Structure) -> None:
        simulator().reset()
        message = getattr(self._library, f"idlora_{op}")(ctypes.byref(problem), None)
        self.launches = simulator().counters()
        simulator().check()
        if message:
            raise RuntimeError(f"idlora_{op}: {message.decode()}")

    def cluster_gather(
        self, y0: Tensor, index: Tensor, bias: Tensor | None = None, row_scale: Tensor | None = None
    ) -> Tensor:
        with Memory() as m:
            x = m.empty((len(y0), *index.shape), y0.dtype)
            problem = STRUCTS["GatherProblem"](
                *y0.shape,
                *index.shape,
                y0.stride(0),
                m.put(y0),
                m.put(index),
                m.put(bias),
                m.put(row_scale),
                x.data_ptr(),
                *_codes(y0, bias),
            )
            self._call("cluster_gather", problem)
        return x

    def rb_scale(self, x: Tensor, router: Tensor, bounded: bool = False, center: Tensor | None = None) -> Tensor:
        with Memory() as m:
            z = m.empty((x.shape[0], x.shape[2]), torch.float32)
            pointers = (m.put(x), m.put(router), m.put(center), z.data_ptr())
            problem = STRUCTS["RbScaleProblem"](
                *x.shape, len(router), *pointers, *_codes(x, router), _form(router, bounded)
            )
            self._call("rb_scale", problem)
        return z

    def shared_gemm(
        self,
        y0: Tensor,
        z: Tensor,
        B: Tensor,
        bias: Tensor | None = None,
        scaling: float = 1.0,
        variant: str = "automatic",
    ) -> Tensor:
        with Memory() as m:
            y = m.empty(tuple(y0.shape), y0.dtype)
            sizes = (*y0.shape, z.shape[1], z.shape[1] // B.shape[1], y0.stride(0))
            pointers = (m.put(y0), m.put(z), m.put(B), m.put(bias), y.data_ptr())
            problem = STRUCTS["SharedGemmProblem"](*sizes, *pointers, scaling, *_codes(y0, B, bias), VARIANTS[variant])
            self._call("shared_gemm", problem)
        return y

    def adapt(
        self,
        y0: Tensor,
        index: Tensor,
        router: Tensor,
        B: Tensor,
        bias: Tensor | None = None,
        scaling: float = 1.0,
        *,
        bias_in_y0: bool = False,
        row_scale: Tensor | None = None,
        bounded: bool = False,
        center: Tensor | None = None,
        keep_x: bool = True,
        variant: str = "automatic",
    ) -> tuple[Tensor, Tensor | None]:
        with Memory() as m:
            y = m.empty(tuple(y0.shape), y0.dtype)
            kept = _kept(index, router, bounded)
            x = m.empty((len(y0), *kept), y0.dtype) if keep_x else None
            x_clusters = math.prod(kept[:-1])
            sizes = (*y0.shape, *index.shape, index.shape[1] // B.shape[1], len(router), x_clusters, y0.stride(0))
            inputs = map(m.put, (y0, index, router, B, bias, row_scale, center))
            pointers = [*inputs, y.data_ptr(), None if x is None else x.data_ptr()]
            codes = (*_codes(y0, router, B, bias), _form(router, bounded), bias_in_y0, VARIANTS[variant])
            self._call("adapt", STRUCTS["AdaptProblem"](*sizes, *pointers, scaling, *codes))
        return y, x

    def adapt_backward(
        self,
        dy: Tensor,
        x: Tensor,
        index: Tensor,
        router: Tensor,
        B: Tensor,
        scaling: float = 1.0,
        *,
        row_scale: Tensor | None = None,
        bounded: bool = False,
        center: Tensor | None = None,
        variant: str = "automatic",
    ) -> tuple[Tensor, Tensor, Tensor]:
        with Memory() as m:
            gradients = [m.empty(tuple(t.shape), t.dtype) for t in (dy, router, B)]
            x_clusters = math.prod(_kept(index, router, bounded)[:-1])
            sizes = (*dy.shape, *index.shape, index.shape[1] // B.shape[1], len(router), x_clusters, dy.stride(0))
            inputs = map(m.put, (dy, x, index, router, B, row_scale, center))
            pointers = [*inputs, *(t.data_ptr() for t in gradients)]
            codes = (*_codes(dy, router, B), _form(router, bounded), VARIANTS[variant])
            problem = STRUCTS["AdaptBackwardProblem"](*sizes, *pointers, None, scaling, *codes)
            workspace = m.new(self._library.idlora_adapt_backward_workspace(ctypes.byref(problem)))
            problem.workspace = workspace.data_ptr()
            self._call("adapt_backward", problem)
        return gradients[0], gradients[1], gradients[2]


def _kept(index: Tensor, router: Tensor, bounded: bool) -> tuple[int, ...]:
    """The last dimensions of the x that is kept: with one weight for all clusters only their sum."""
    return (index.shape[1],) if bounded or router.shape == (1,) else tuple(index.shape)


def _form(router: Tensor, bounded: bool) -> int:
    return BOUNDED if bounded else CONSTANTS if router.ndim == 1 else LINEAR


def _codes(activation: Tensor, *others: Tensor | None) -> list[int]:
    return [DTYPES[activation.dtype if t is None else t.dtype] for t in (activation, *others)]
