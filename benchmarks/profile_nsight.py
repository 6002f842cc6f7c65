"""Adapters of a named model, one by one, for Nsight Systems and Nsight Compute, and DRAM bytes against the limit.

Every distinct shape among the model's adapted layers becomes one problem; the forward and backward pass of
``idlora::adapt`` run on it inside NVTX ranges ``layer sizes | phase | op``. No weights are needed. Alone, or without a
GPU, the script is a dry run that checks the results and prints the shapes and their limits.

    python benchmarks/profile_nsight.py --model llama-3-8b --tokens 4096 --print-commands

prints the commands, ready to copy. ``--capture shapes.json`` takes the shapes of a run of your own model instead, as
``idlora_ext.profiling.captured_shapes`` collects them. ``--parse FILE.csv`` turns what ncu wrote into a table. The
ranges' names hold the sizes, so it needs no other option, but ``--iterations`` where there was more than one.

ncu flushes the caches before each kernel. What a kernel wrote and L2 still holds at its end is in no DRAM counter: a
ratio below 1 says that the output fits into L2. Read it at sizes well beyond that.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shlex
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers
from harness.limits import backward_limit, forward_limit
from torch import Tensor

import idlora_ext
from idlora_ext import ops, profiling, reference
from idlora_ext.ops import nvtx

MODELS = {  # decoder sizes, from the models' own config.json
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "llama-3.2-3b": {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip

METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum")
UNITS = {
    "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "Tbyte": 1e12,
    "ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0,
    "nsecond": 1e-9, "usecond": 1e-6, "msecond": 1e-3, "second": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What one adapted layer is called with; the fields of :func:`idlora_ext.profiling.captured_shapes`."""

    layer: str
    N: int
    d: int
    k: int
    r: int
    s: int
    shared_router: bool
    dtype: str
    router_dtype: str
    B_dtype: str
    static_router: bool = False
    bounded: bool = False
    row_scale: bool = False

    def __str__(self) -> str:
        form = "static" if self.static_router else "bounded" if self.bounded else ""
        return (
            f"{self.layer} N={self.N} d={self.d} k={self.k} r={self.r} s={self.s} dtype={self.dtype} "
            f"router={form}{1 if self.shared_router else self.k}x{self.router_dtype} "
            f"B={self.B_dtype}{' scaled' if self.row_scale else ''}"
        )

    @staticmethod
    def parse(text: str) -> Shape:
        """The shape whose string is ``text``."""
        pattern = r"(\S+) N=(\d+) d=(\d+) k=(\d+) r=(\d+) s=(\d+) dtype=(\w+) "
        pattern += r"router=(static|bounded)?(\d+)x(\w+) B=(\w+)( scaled)?"
        match = re.fullmatch(pattern, text)
        if match is None:
            raise SystemExit(f"range {text!r} holds no sizes: --parse reads profiles of this script's replays")
        layer, *sizes, dtype, form, rows, router_dtype, B_dtype, scaled = match.groups()
        forms = form == "static", form == "bounded", bool(scaled)
        return Shape(layer, *map(int, sizes), int(rows) == 1, dtype, router_dtype, B_dtype, *forms)

    def limit(self, phase: str) -> int:
        """DRAM bytes that this phase of a training step cannot do without."""
        sizes = (self.N, self.d, self.k, self.r, self.s)
        widths = [getattr(torch, name).itemsize for name in (self.dtype, self.B_dtype, self.router_dtype)]
        form = {name: getattr(self, name) for name in ("shared_router", "static_router", "bounded", "row_scale")}
        if phase == "forward":
            return forward_limit(*sizes, *widths, training=True, **form)
        return backward_limit(*sizes, *widths, **form)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-3-8b")
    parser.add_argument("--tokens", type=int, default=4096, help="N of every layer")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of activations"
    )
    parser.add_argument("--param-dtype", choices=("bfloat16", "float16", "float32"), default="float32",
                        help="of B and router; PEFT makes them float32")  # fmt: skip
    parser.add_argument("--r", type=int, default=128, help="rank; narrow layers get the largest that fits")
    parser.add_argument("--layers", metavar="REGEX", default="", help="only layers whose name contains it")
    parser.add_argument("--capture", metavar="FILE", type=Path, help="replay these shapes instead of a model's")
    parser.add_argument("--iterations", type=int, default=1, help="forward and backward passes of each layer")
    parser.add_argument("--print-commands", action="store_true", help="print nsys and ncu commands, and stop")
    parser.add_argument("--parse", metavar="FILE.csv", type=Path, help="read what ncu wrote, and stop")
    options = parser.parse_args()
    if options.print_commands:
        print(commands(options))
    elif options.parse:
        print(table(read_ncu(options.parse.read_text().splitlines()), options.iterations))
    else:
        shapes = captured(options.capture) if options.capture else synthetic(options)
        run(distinct([shape for shape in shapes if re.search(options.layers, shape.layer)]), options.iterations)


# ---- shapes ----------------------------------------------------------------------------------------------------------


def synthetic(options: argparse.Namespace) -> list[Shape]:
    """The layers that ``idlora_ext.apply`` adapts in a model of these sizes, found on the meta device."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**MODELS[options.model]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*too narrow")  # the table shows the rank of each layer
        idlora_ext.apply(model, r=options.r, progress=False)
    dtypes = (options.dtype, options.param_dtype, options.param_dtype)
    config = idlora_ext.IdLoraConfig()
    forms = config.router == "static", config.router == "bounded", config.row_scale
    rows = idlora_ext.summary(model).rows
    return [
        Shape(row.name, options.tokens, row.d, row.k, row.r, row.s, config.shared_router, *dtypes, *forms)
        for row in rows
    ]


def captured(file: Path) -> list[Shape]:
    return [Shape(**shape) for shape in json.loads(file.read_text())]


def distinct(shapes: Sequence[Shape]) -> dict[Shape, int]:
    """The first layer of every shape, and how many have it."""
    if not shapes:
        raise SystemExit("no layer is left to profile")
    first: dict[Shape, Shape] = {}
    for shape in shapes:
        first.setdefault(replace(shape, layer=""), shape)
    counts = Counter(replace(shape, layer="") for shape in shapes)
    return {shape: counts[nameless] for nameless, shape in first.items()}


# ---- replay ----------------------------------------------------------------------------------------------------------


def run(shapes: dict[Shape, int], iterations: int) -> None:
    """Prepare all layers, then profile them with nothing in between."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{'forward':>10} {'backward':>10}  the limit, MB; on {device}, {iterations} x forward and backward")
    passes = []
    for shape, count in shapes.items():
        passes.append((str(shape), prepare(shape, device)))
        forward, backward = (shape.limit(phase) / 1e6 for phase in ("forward", "backward"))
        print(f"{forward:>10.3f} {backward:>10.3f}  {shape}" + (f" (and {count - 1} more)" if count > 1 else ""))
    with torch.cuda.profiler.profile() if device == "cuda" else nullcontext(), profiling.nvtx_ranges():
        for name, once in passes:
            for _ in range(iterations):
                with nvtx.layer(name):
                    once()
        if device == "cuda":
            torch.cuda.synchronize()


def prepare(shape: Shape, device: str) -> Callable[[], tuple[Tensor, Tensor]]:
    """A warm and checked forward and backward pass that returns ``y`` and ``dy0``."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int, dtype: str, scale: float = 1.0) -> Tensor:
        values = torch.randn(*size, generator=generator, device=device, dtype=torch.float32) * scale
        return values.to(getattr(torch, dtype))

    k, r, s = shape.k, shape.r, shape.s
    y0 = random(shape.N, shape.d, dtype=shape.dtype).requires_grad_()
    dy = random(shape.N, shape.d, dtype=shape.dtype)
    index = torch.randperm(shape.d, generator=generator, device=device)[: k * r].view(k, r).to(torch.int32)
    rows = 1 if shape.shared_router else k
    size, scale = ((rows,), 1.0) if shape.static_router else ((rows, r), (k * r) ** -0.5)
    router = random(*size, dtype=shape.router_dtype, scale=scale)
    B = random(shape.d // s, r // s, dtype=shape.B_dtype, scale=(r // s) ** -0.5)
    router.requires_grad_()
    B.requires_grad_()
    row_scale = 0.5 + torch.rand(k, r, generator=generator, device=device) if shape.row_scale else None

    def once() -> tuple[Tensor, Tensor]:
        y = ops.adapt(y0, index, router, B, row_scale=row_scale, bounded=shape.bounded)
        return y, torch.autograd.grad(y, (y0, router, B), dy)[0]

    y, dy0 = once()
    some = y0[:8].detach().double().requires_grad_()
    parameters = router.detach().double(), B.detach().double()
    expected = reference.adapt(some, index, *parameters, row_scale=row_scale, bounded=shape.bounded)
    (dsome,) = torch.autograd.grad(expected, some, dy[:8].double())
    for what, ours, theirs in (("y", y[:8], expected), ("dy0", dy0[:8], dsome)):
        error = ((ours - theirs).norm() / theirs.norm()).item() if shape.N else 0.0
        if not error < 4 * torch.finfo(ours.dtype).eps:
            raise SystemExit(f"{shape}: {what} is wrong, relative error {error:.1e}")
    return once


# ---- commands --------------------------------------------------------------------------------------------------------


def commands(options: argparse.Namespace) -> str:
    """What to copy into a shell."""
    what = f"--capture {shlex.quote(str(options.capture))}" if options.capture else f"--model {options.model}"
    for name in ("tokens", "dtype", "param_dtype", "r"):
        if not options.capture:
            what += f" --{name.replace('_', '-')} {getattr(options, name)}"
    if options.layers:
        what += f" --layers {shlex.quote(options.layers)}"
    name = options.capture.stem if options.capture else f"{options.model}-{options.tokens}"
    script = f"python benchmarks/profile_nsight.py {what}"
    ncu = "ncu --nvtx --nvtx-include 'regex:idlora@.+/'"
    return f"""\
# Nsight Systems: a timeline with the ranges, and the kernels of each range
nsys profile --trace=cuda,nvtx --capture-range=cudaProfilerApi --capture-range-end=stop --force-overwrite=true \\
    --output={name} {script} --iterations 20
nsys stats --report nvtx_kern_sum {name}.nsys-rep

# Nsight Compute: DRAM bytes of each range, then the table
{ncu} --metrics {",".join(METRICS)} \\
    --csv --page raw --print-units base --log-file {name}.csv {script}
python benchmarks/profile_nsight.py --parse {name}.csv

# Nsight Compute: everything about the forward ranges, by source line (build with IDLORA_LINEINFO=1), for ncu-ui
{ncu.replace(".+/", ".+forward.+/")} --set full --import-source yes --force-overwrite \\
    --export {name} {script}"""


# ---- what ncu wrote --------------------------------------------------------------------------------------------------


@dataclass
class Cost:
    """Kernels launched in one range, over all iterations: how often each, bytes and seconds."""

    kernels: Counter[str] = field(default_factory=Counter)
    read: float = 0.0
    written: float = 0.0
    seconds: float = 0.0


def read_ncu(lines: Iterable[str]) -> dict[tuple[Shape, str, str], Cost]:
    """ncu's raw page as CSV: a header, a line of units, a line for each kernel; by ``(shape, phase, op)``.

    Lines of ncu's log (``==PROF== ...``) are passed over. Columns are found by name: versions of ncu differ in others.
    """
    rows = list(csv.reader(line for line in lines if line.startswith('"')))
    if len(rows) < 3:
        raise SystemExit("no kernels in the file: was the range's name right, and could ncu read the counters?")
    header, units, *kernels = rows
    ranges = next((i for i, title in enumerate(header) if "Push/Pop_Range" in title), None)
    if ranges is None or not {"Kernel Name", *METRICS} <= set(header):
        raise SystemExit(f"need ncu --nvtx --csv --page raw --metrics {','.join(METRICS)}, got columns {header}")

    def value(row: Sequence[str], metric: str) -> float:
        column = header.index(metric)
        if units[column] not in UNITS:
            raise SystemExit(f"{metric}: unknown unit {units[column]!r}")
        return float(row[column].replace(",", "")) * UNITS[units[column]]

    costs: dict[tuple[Shape, str, str], Cost] = {}
    for row in kernels:
        # 'thread "domain:range:none:..."', outer ranges first
        found = re.findall(r'"idlora:([^"|]+) \| (forward|backward) \| (idlora::\w+)', row[ranges])
        if not found:
            continue
        layer, phase, op = found[-1]
        cost = costs.setdefault((Shape.parse(layer), phase, op), Cost())
        cost.kernels[re.split(r"[<(]", row[header.index("Kernel Name")].removeprefix("void "))[0]] += 1
        for attribute, metric in zip(("read", "written", "seconds"), METRICS, strict=True):
            setattr(cost, attribute, getattr(cost, attribute) + value(row, metric))
    if not costs:
        raise SystemExit("no kernel ran in a range of the domain idlora")
    return costs


def table(costs: dict[tuple[Shape, str, str], Cost], iterations: int) -> str:
    """One line a range: bytes of one pass, the limit, their ratio, and the bytes moved a second."""
    head = ("layer", "N", "d", "phase", "read MB", "written MB", "limit MB", "ratio", "us", "GB/s", "kernels")
    lines = [head]
    for (shape, phase, op), cost in costs.items():
        if any(count % iterations for count in cost.kernels.values()):
            raise SystemExit(f"{shape} | {phase} | {op}: {dict(cost.kernels)} in {iterations} iterations?")
        read, written, seconds = (total / iterations for total in (cost.read, cost.written, cost.seconds))
        limit, moved = shape.limit(phase), read + written
        kernels = ", ".join(
            name if count == iterations else f"{count // iterations} x {name}" for name, count in cost.kernels.items()
        )
        figures = (f"{read / 1e6:.3f}", f"{written / 1e6:.3f}", f"{limit / 1e6:.3f}", f"{moved / limit:.3f}")
        speed = (f"{seconds * 1e6:.1f}", f"{moved / seconds / 1e9:.0f}" if seconds else "")
        lines.append((shape.layer, str(shape.N), str(shape.d), phase, *figures, *speed, kernels))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = {"layer", "phase", "kernels"}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if name in left else cell.rjust(width)
            for name, cell, width in zip(head, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


if __name__ == "__main__":
    main()
