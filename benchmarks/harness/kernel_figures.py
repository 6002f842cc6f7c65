"""The figures of the kernel benchmark, their goals, and the roofline model.

Nothing here is timed: a *modelled* time is the largest of the times that DRAM, L2, tensor cores, float32 units, shared
memory and instruction issue would need at their peak rates for what was counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import kernel_library, traffic
from .limits import backward_limit, forward_limit
from .modelled import ARCHITECTURES, SECTOR, Shape, Usage, short_name, stable_name

GOAL_DEVICE = "H100"

# Bytes that a block keeps on their way from memory while it streams: threads x loads in flight x width. By kernel;
# no counter tells, so whoever changes a kernel's loads changes the figure here.
BYTES_IN_FLIGHT: dict[str, Callable[[dict[str, Any]], int]] = {
    # y0: the next two tiles of 16 rows, two 16-byte loads a thread each (tensor.cuh)
    "adapt_prefill": lambda launch: launch["block"][0] * 2 * 2 * 16,
    # B of the first group: eight 16-byte loads a thread, on their way while the tokens are routed
    "adapt_decode": lambda launch: launch["block"][0] * 8 * 16,
    # the fewest of its phases: 32 rows of 64 columns of dy a warp, 4 bytes at a time
    "adapt_backward_rows": lambda launch: launch["block"][0] * 32 * 4,
    # two of the three stages of the ring, which is all of its shared memory
    "adapt_backward_shared": lambda launch: launch["dynamic_smem"] * 2 // 3,
    # four partial sums a thread
    "adapt_backward_sums": lambda launch: launch["block"][0] * 4 * 4,
}


class Goal(NamedTuple):
    """At most, or at least, so much; asked from ``tokens`` on."""

    figure: str
    label: str
    forward: float
    backward: float
    at_least: bool = False
    tokens: int = 0

    def judge(self, figures: dict[str, Any]) -> str:
        """ "met" or "missed"; "" where nothing is asked or known."""
        value = figures[self.figure]
        if value is None or figures["N"] < self.tokens:
            return ""
        bound, value = getattr(self, figures["phase"]), round(value, 2)
        return "met" if (value >= bound if self.at_least else value <= bound) else "missed"


GOALS = (
    Goal("findings", "findings of all checks", 0, 0),
    Goal("dram", "unique DRAM sectors / limit, dy counted once", 1.05, 1.05),
    Goal("l2", "L2 sectors / limit", 2.5, 3.0),
    Goal("loads", "sectors per streaming load / ideal", 1.0, 1.0),
    Goal("stores", "sectors per streaming store / ideal", 1.0, 1.0),
    Goal("wavefronts", "shared-memory wavefronts / ideal", 1.05, 1.05),
    Goal("spills", "bytes spilled, all kernels, sm_80/90/100", 0, 0),
    Goal("roofline", f"modelled time / DRAM time, {GOAL_DEVICE}", 1.25, 1.35, tokens=512),
    Goal("in_flight", f"KiB in flight per SM, {GOAL_DEVICE}", 32, 32, at_least=True),
    Goal("launches", "launches", 1, 3),
    Goal("as_written", "eager PyTorch's modelled bytes / ours", 3, 3, at_least=True),
    Goal("lora", "those of PEFT's LoRA r=32 / ours", 3, 3, at_least=True),
)


def figures(
    shape: Shape, phase: str, counted: dict[str, dict[str, Any]], findings: int, usage: Usage
) -> dict[str, Any]:
    """Every figure of one pass.

    ``counted``: architecture -> what `modelled.count` returned; ``findings``: those of `modelled.check` under other
    orders of warps and blocks; ``usage``: what `modelled.resources` returned.
    """
    limit = forward_limit(*shape, 2, 2, 2, training=True) if phase == "forward" else backward_limit(*shape, 2, 2, 2)
    mine = counted[ARCHITECTURES[GOAL_DEVICE]][phase]
    launches = mine["launches"]
    dram = _dram(launches)
    dy = mine.get("dy_sectors", [0])
    times = {device: model(counted[arch][phase]["launches"], usage, device) for device, arch in ARCHITECTURES.items()}
    others = {
        "as_written": traffic.as_written(*shape, torch.bfloat16)[phase],
        "default_kernels": traffic.default_kernels(*shape, torch.bfloat16)[phase],
        "lora": traffic.lora(shape.N, shape.d, torch.bfloat16)[phase],
    }
    return {
        "shape": str(shape),
        "N": shape.N,
        "phase": phase,
        "limit_bytes": limit,
        "dram_bytes": dram,
        "findings": findings + sum(len(launch["findings"]) for launch in launches),
        "dram": (dram - SECTOR * (sum(dy) - max(dy))) / limit,
        "dram_strict": dram / limit,
        "l2": _l2(launches) / limit,
        "loads": _ratio(mine["contiguous"], "load"),
        "stores": _ratio(launches, "store"),
        "wavefronts": _wavefronts(launches),
        "spills": sum(k["spill_stores"] + k["spill_loads"] for kernels in usage.values() for k in kernels.values()),
        "roofline": times[GOAL_DEVICE]["seconds"] / times[GOAL_DEVICE]["dram_seconds"],
        "in_flight": _in_flight(times[GOAL_DEVICE]["launches"]),
        "launches": len(launches),
        **{name: moved / dram for name, moved in others.items()},
        "lora_limit": others["lora"] / limit,
        "other_bytes": others,
        "modelled": times,
        "errors": mine["errors"],
    }


def model(launches: list[dict[str, Any]], usage: Usage, device: str) -> dict[str, Any]:
    """The roofline model of consecutive launches: their times add up."""
    roofline = kernel_library.simulator().roofline
    rows = []
    for launch in launches:
        bound = roofline.model(launch, {launch["mangled"]: _usage(usage, ARCHITECTURES[device], launch)}, device)
        kernel = short_name(launch)
        outstanding = BYTES_IN_FLIGHT.get(kernel.partition("<")[0])
        rows.append(
            bound
            | {
                "kernel": kernel,
                **{name: launch[name] for name in ("grid", "block", "dynamic_smem")},
                "dram_bytes": _dram([launch]),
                "l2_bytes": _l2([launch]),
                "loads": _ratio([launch], "load"),
                "stores": _ratio([launch], "store"),
                "wavefronts": _wavefronts([launch]),
                "in_flight": None if outstanding is None else outstanding(launch) * bound["blocks_per_sm"],
            }
        )
    return {
        "seconds": sum(row["time"] for row in rows),
        "dram_seconds": sum(row["times"]["dram"] for row in rows),
        "flops": _sum(launches, "mma_flops", "fma_flops"),
        "launches": rows,
    }


def _usage(usage: Usage, arch: str, launch: dict[str, Any]) -> dict[str, int]:
    return usage[arch][stable_name(launch["mangled"])]


def _in_flight(launches: list[dict[str, Any]]) -> float | None:
    """KiB of the launch with the fewest; None while BYTES_IN_FLIGHT does not say."""
    known = [launch["in_flight"] for launch in launches]
    return None if None in known else min(known) / 1024


def _dram(launches: list[dict[str, Any]]) -> int:
    return SECTOR * _sum(launches, "unique_sectors_read", "unique_sectors_written")


def _l2(launches: list[dict[str, Any]]) -> int:
    return SECTOR * _sum(launches, "global_load_sectors", "global_store_sectors")


def _ratio(launches: list[dict[str, Any]], kind: str) -> float:
    """Bytes of the sectors that all loads (or stores) moved, over the bytes they asked for."""
    return SECTOR * _sum(launches, f"global_{kind}_sectors") / max(1, _sum(launches, f"global_{kind}_bytes"))


def _wavefronts(launches: list[dict[str, Any]]) -> float:
    counted = _sum(launches, "shared_load_wavefronts", "shared_store_wavefronts")
    return counted / max(1, _sum(launches, "shared_load_wavefronts_ideal", "shared_store_wavefronts_ideal"))


def _sum(launches: list[dict[str, Any]], *names: str) -> int:
    return sum(launch[name] for launch in launches for name in names)
