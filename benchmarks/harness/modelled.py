"""What the simulator counts of the kernels at a shape, once their results are verified, and what ptxas says of them."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from idlora_ext import reference

from . import kernel_library

SECTOR = 32
ARCHITECTURES = {"A100": "sm_80", "H100": "sm_90", "H200": "sm_90", "B200": "sm_100"}
CSRC = kernel_library.ROOT / "csrc"

Usage = dict[str, dict[str, dict[str, int]]]  # architecture -> kernel -> registers, spill_stores, spill_loads, ..


class Shape(NamedTuple):
    N: int
    d: int
    k: int = 4
    r: int = 128
    s: int = 2

    def __str__(self) -> str:
        usual = self._field_defaults
        return " ".join(f"{n}={v}" for n, v in self._asdict().items() if usual.get(n) != v)


def problem(shape: Shape, *, contiguous_rows: bool = False) -> dict[str, Tensor]:
    """bfloat16 tensors of one layer with a shared router; ``contiguous_rows``: index = 0, 1, 2, .."""
    N, d, k, r, s = shape
    generator = torch.Generator().manual_seed(N * d)
    index = torch.arange(d) if contiguous_rows else torch.randperm(d, generator=generator)
    return {
        "y0": torch.randn(N, d, generator=generator).bfloat16(),
        "dy": torch.randn(N, d, generator=generator).bfloat16(),
        "index": index[: k * r].view(k, r).to(torch.int32),
        "router": (torch.randn(1, r, generator=generator) / (k * r) ** 0.5).bfloat16(),
        "B": (torch.randn(d // s, r // s, generator=generator) / (r // s) ** 0.5).bfloat16(),
    }


# ---- counting: runs in a process with the simulator's settings in its environment ------------------------------------

KEPT = [
    "kernel",
    "mangled",
    "grid",
    "block",
    "dynamic_smem",
    "static_smem",
    "warp_instructions",
    "global_load_requests",
    "global_load_sectors",
    "global_load_bytes",
    "global_store_requests",
    "global_store_sectors",
    "global_store_bytes",
    "unique_sectors_read",
    "unique_sectors_written",
    "shared_load_wavefronts",
    "shared_load_wavefronts_ideal",
    "shared_store_wavefronts",
    "shared_store_wavefronts_ideal",
    "mma_flops",
    "fma_flops",
    "findings",
    "simulation_seconds",
]


def check(shape: Shape) -> int:
    """Findings of all checks, forward and backward, under this process's order of warps and blocks."""
    kernels, t = _kernels(), problem(shape)
    adapter = (t["index"], t["router"], t["B"])
    _, x = kernels.adapt(t["y0"], *adapter)
    launches = _kept(kernels)
    kernels.adapt_backward(t["dy"], x, *adapter)
    return sum(len(launch["findings"]) for launch in launches + _kept(kernels))


def count(shape: Shape) -> dict[str, Any]:
    """Forward (``x`` kept, as in training) and backward: the counters of every launch, after the results are verified.

    Beside them, of the same launches: ``contiguous``, with neighbouring rows chosen, so that gathers stream too; and
    for the backward pass ``dy_sectors``, what each launch read of ``dy``: its unique sectors minus those it needs when
    all rows of ``dy`` are one.
    """
    kernels = _kernels()
    t = problem(shape)
    adapter = (t["index"], t["router"], t["B"])
    y, x = kernels.adapt(t["y0"], *adapter)
    forward = {"launches": _kept(kernels), "errors": verify_forward(t, y, x)}
    gradients = kernels.adapt_backward(t["dy"], x, *adapter)
    backward = {"launches": _kept(kernels), "errors": verify_backward(t, *gradients)}

    one_row = t["dy"][:1].expand(shape.N, -1)
    kernels.adapt_backward(one_row, x, *adapter)
    row = t["dy"][0].nbytes // SECTOR
    saved = [
        before["unique_sectors_read"] - after["unique_sectors_read"]
        for before, after in zip(backward["launches"], _kept(kernels), strict=True)
    ]
    backward["dy_sectors"] = [n + row if n > 0 else 0 for n in saved]

    t = problem(shape, contiguous_rows=True)
    adapter = (t["index"], t["router"], t["B"])
    _, x = kernels.adapt(t["y0"], *adapter)
    forward["contiguous"] = _kept(kernels)
    kernels.adapt_backward(t["dy"], x, *adapter)
    backward["contiguous"] = _kept(kernels)
    return {"forward": forward, "backward": backward}


@cache
def _kernels() -> kernel_library.Kernels:
    return kernel_library.Kernels(kernel_library.build())


def _kept(kernels: kernel_library.Kernels) -> list[dict[str, Any]]:
    return [{name: launch[name] for name in KEPT} for launch in kernels.launches]


def verify_forward(t: dict[str, Tensor], y: Tensor, x: Tensor) -> dict[str, list[float]]:
    """Largest error against float64 and that of the same maths in bfloat16, on up to 48 tokens; at most twice it."""
    if not torch.equal(x, t["y0"][:, t["index"].long()]):
        raise SystemExit("adapt: x differs from y0[:, index]")
    tokens = sample(len(y))
    adapter = [t["router"], t["B"]]
    exact = reference.adapt(t["y0"][tokens].double(), t["index"], *(p.double() for p in adapter))
    plain = reference.adapt(t["y0"][tokens], t["index"], *adapter)
    return compare(2, y=(y[tokens], exact, plain))


def verify_backward(t: dict[str, Tensor], dy0: Tensor, dT: Tensor, dB: Tensor) -> dict[str, list[float]]:
    """As for forward: ``dy0`` on a sample of tokens; ``dT`` and ``dB``, which all tokens enter, in full. Thrice."""
    tokens = sample(len(dy0))
    exact_dy0, plain_dy0 = (_gradients(t, dtype, tokens)[0] for dtype in (torch.float64, torch.bfloat16))
    chunks = torch.arange(len(dy0)).split(256)
    exact = [sum(parts) for parts in zip(*(_gradients(t, torch.float64, c)[1:] for c in chunks), strict=True)]
    plain = _gradients(t, torch.bfloat16, torch.arange(len(dy0)))[1:]
    return compare(3, dy0=(dy0[tokens], exact_dy0, plain_dy0), dT=(dT, exact[0], plain[0]), dB=(dB, exact[1], plain[1]))


def sample(N: int) -> Tensor:
    """Up to 48 tokens: the first, the last, and some between."""
    if N <= 48:
        return torch.arange(N)
    between = torch.randperm(N - 32, generator=torch.Generator().manual_seed(0))[:16] + 16
    return torch.cat([torch.arange(16), between, torch.arange(N - 16, N)])


def compare(times: float, **tensors: tuple[Tensor, Tensor, Tensor]) -> dict[str, list[float]]:
    errors = {
        name: [(o.double() - e).abs().max().item() for o in (ours, plain)] for name, (ours, e, plain) in tensors.items()
    }
    for name, (ours, plain) in errors.items():
        if not ours <= times * plain:
            raise SystemExit(f"{name}: error {ours:.3g}, allowed are {times} x {plain:.3g}, those of plain PyTorch")
    return errors


def _gradients(t: dict[str, Tensor], dtype: torch.dtype, tokens: Tensor) -> tuple[Tensor, ...]:
    variables = [p.to(dtype).requires_grad_() for p in (t["y0"][tokens], t["router"], t["B"])]
    y = reference.adapt(variables[0], t["index"], *variables[1:])
    return torch.autograd.grad(y, variables, t["dy"][tokens].to(dtype))


# ---- registers and spills --------------------------------------------------------------------------------------------


def resources(architectures: Iterable[str] = ("sm_80", "sm_90", "sm_100")) -> Usage:
    """Architecture -> kernel -> registers, spill_stores, spill_loads, ..: what ptxas says of every kernel."""
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    jobs = [(source, arch) for arch in architectures for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        found: Usage = {}
        for (_, arch), usage in zip(jobs, threads.map(lambda job: _ptxas(*job), jobs), strict=True):
            found.setdefault(arch, {}).update(usage)
    return found


def _ptxas(source: Path, arch: str) -> dict[str, dict[str, int]]:
    command = [kernel_library.simulator().nvcc(), "-O3", "-std=c++17", f"-arch={arch}", "-Xptxas", "-v", "-cubin"]
    done = subprocess.run(
        [*command, "-I", CSRC, source, "-o", os.devnull], capture_output=True, text=True, check=False, cwd=CSRC.parent
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    parsed = kernel_library.simulator().roofline.parse_ptxas(done.stderr)
    return {stable_name(name): usage for name, usage in parsed.items()}


def stable_name(mangled: str) -> str:
    """Without the hashes that nvcc puts into names of an unnamed namespace, which differ between two builds."""
    return re.sub(r"(_GLOBAL__N__)[0-9a-f]{8}(_\d+_\w+?_cu_)[0-9a-f]{8}", r"\g<1>00000000\g<2>00000000", mangled)


def short_name(launch: dict[str, Any]) -> str:
    """``adapt_prefill<__nv_bfloat16, 2>`` of the demangled name."""
    name = re.sub(r"\(.*\)$|^void ", "", launch["kernel"].replace("(anonymous namespace)::", ""))
    return re.sub(r"^(?:\w+::)+", "", name)


def source_hash() -> str:
    """Of everything the counters depend on."""
    files = [*sorted(CSRC.glob("cuda/*.cu*")), *sorted(CSRC.glob("cuda/*.h")), CSRC / "idlora" / "problems.h"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def tools() -> dict[str, str]:
    """Versions of what the figures rest on besides the machine's."""
    version = subprocess.run(
        [kernel_library.simulator().nvcc(), "--version"], capture_output=True, text=True, check=True
    )
    return {"nvcc": re.findall(r"release .*", version.stdout)[0], "simulator": "ptxsim"}
