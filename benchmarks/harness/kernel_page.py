"""Tables and picture of the kernel benchmark: the terminal, KERNELS.md, and a roofline."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from . import kernel_library
from .kernel_figures import GOAL_DEVICE, GOALS, Goal
from .modelled import ARCHITECTURES, Usage
from .table import table

PAGE = Path(__file__).resolve().parents[1] / "KERNELS.md"
BEGIN, END = "<!-- written by bench_kernels.py: begin -->", "<!-- written by bench_kernels.py: end -->"


def goal_table(rows: list[dict[str, Any]]) -> str:
    """A row for each figure, a column for each shape; what misses its goal is bold."""
    tables = []
    for phase in ("forward", "backward"):
        mine = [row for row in rows if row["phase"] == phase]
        lines = [[goal.label, _bound(goal, phase), *(_cell(goal, row) for row in mine)] for goal in GOALS]
        lines += [[label, "", *(_number(row[figure]) for row in mine)] for figure, label in ALSO.items()]
        tables.append(f"### {phase.capitalize()}\n\n" + table([phase, "goal", *(row["shape"] for row in mine)], lines))
    return "\n\n".join(tables)


ALSO = {
    "dram_strict": "unique DRAM sectors / limit, summed over launches",
    "lora_limit": "modelled bytes of PEFT's LoRA r=32 / the limit",
    "default_kernels": "modelled bytes of the package's default kernels / ours",
}


def _bound(goal: Goal, phase: str) -> str:
    asked = f" from N = {goal.tokens}" if goal.tokens else ""
    return f"{'≥' if goal.at_least else '≤'} {getattr(goal, phase):g}{asked}"


def _cell(goal: Goal, row: dict[str, Any]) -> str:
    value = _number(row[goal.figure])
    return f"**{value}**" if goal.judge(row) == "missed" else value


def _number(value: float | None) -> str:
    if value is None:
        return "?"
    return str(value) if isinstance(value, int) else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def verdict_table(rows: list[dict[str, Any]]) -> str:
    """A row for each goal: met at how many shapes, and the worst figure."""
    lines = []
    for goal in GOALS:
        line = [goal.label]
        for phase in ("forward", "backward"):
            judged = [(row, goal.judge(row)) for row in rows if row["phase"] == phase]
            judged = [(row, verdict) for row, verdict in judged if verdict]
            missed = [row for row, verdict in judged if verdict == "missed"]
            if not judged:
                line += [_bound(goal, phase), "unknown", ""]
                continue
            worst = (min if goal.at_least else max)(row[goal.figure] for row, _ in judged)
            line += [
                _bound(goal, phase),
                f"**missed** at {len(missed)} of {len(judged)}" if missed else "met",
                _number(worst),
            ]
        lines.append(line)
    return table(["figure", "forward", "", "worst", "backward", "", "worst"], lines)


def time_table(rows: list[dict[str, Any]]) -> str:
    """Modelled microseconds by device, and what bounds the launches."""
    devices = list(ARCHITECTURES)
    lines = []
    for row in rows:
        times = [row["modelled"][device] for device in devices]
        cells = [f"{1e6 * t['seconds']:.1f} ({t['seconds'] / t['dram_seconds']:.2f})" for t in times]
        goal = row["modelled"][GOAL_DEVICE]["launches"]
        bounds = ", ".join(f"{launch['kernel'].partition('<')[0]}: {launch['limit']}" for launch in goal)
        lines.append([row["shape"], row["phase"], *cells, bounds])
    return table(["shape", "", *devices, f"bound by, on {GOAL_DEVICE}"], lines)


def launch_table(rows: list[dict[str, Any]]) -> str:
    """Every launch on the device of the goals: configuration, occupancy, traffic, modelled times in microseconds."""
    lines = []
    for row in rows:
        for launch in row["modelled"][GOAL_DEVICE]["launches"]:
            lines.append(
                [
                    row["shape"],
                    launch["kernel"].partition("<")[0],
                    f"{math.prod(launch['grid'])} x {math.prod(launch['block'])}",
                    f"{launch['dynamic_smem'] / 1024:.0f}",
                    str(launch["registers"]),
                    f"{launch['blocks_per_sm']} ({launch['occupancy_limit']})",
                    f"{launch['dram_bytes'] / 1e6:.2f}",
                    f"{launch['l2_bytes'] / 1e6:.2f}",
                    *(f"{launch[ratio]:.2f}" for ratio in ("loads", "stores", "wavefronts")),
                    *(f"{1e6 * time:.2f}" for time in launch["times"].values()),
                ]
            )
    times = rows[0]["modelled"][GOAL_DEVICE]["launches"][0]["times"]
    head = [
        "shape",
        "kernel",
        "blocks x threads",
        "shared KiB",
        "registers",
        "blocks per SM (limit)",
        "DRAM MB",
        "L2 MB",
    ]
    return table([*head, "loads", "stores", "wavefronts", *times], lines)


def resource_table(usage: Usage) -> str:
    """A row for each kernel: its variants, most registers, bytes spilled."""
    names: dict[str, list[str]] = {}
    for mangled in next(iter(usage.values())):
        names.setdefault(_family(mangled), []).append(mangled)
    lines = []
    for family, variants in sorted(names.items()):
        line = [family, str(len(variants))]
        for kernels in usage.values():
            mine = [kernels[name] for name in variants]
            line += [
                str(max(k["registers"] for k in mine)),
                str(sum(k["spill_stores"] + k["spill_loads"] for k in mine)),
            ]
        lines.append(line)
    head = ["kernel", "variants", *(word for arch in usage for word in (f"{arch} registers", "spilled bytes"))]
    return table(head, lines)


def _family(mangled: str) -> str:
    """The last identifier of a mangled nested name."""
    words, rest = [], mangled.removeprefix("_ZN")
    while (length := re.match(r"\d+", rest)) is not None:
        start, n = length.end(), int(length[0])
        words.append(rest[start : start + n])
        rest = rest[start + n :]
    return words[-1]


def timing_table(rows: list[dict[str, Any]]) -> str:
    """What was measured on a GPU."""
    names = list(rows[0]["microseconds"])
    lines = [
        [
            row["shape"],
            row["phase"],
            *("{median:.1f} ({p20:.1f}-{p80:.1f})".format(**row["microseconds"][name]) for name in names),
            f"{row['gb_per_s']:.0f}",
            f"{row['percent_of_copy']:.0f} %",
        ]
        for row in rows
    ]
    return table(["shape", "", *(f"{name}, us" for name in names), "ours, GB/s of the limit", "of a copy"], lines)


def write(rows: list[dict[str, Any]], usage: Usage, picture: Path) -> None:
    """Replaces the generated part of KERNELS.md, and draws the picture. Text around the part stays."""
    draw(rows, picture)
    parts = {
        "Goals": verdict_table(rows),
        "Figures": goal_table(rows),
        "Modelled times": "Microseconds, and in brackets the ratio to the DRAM time.\n\n" + time_table(rows),
        "Launches": f"On {GOAL_DEVICE}; loads, stores and wavefronts over their ideal, rows chosen at random; modelled "
        "microseconds by resource.\n\n" + launch_table(rows),
        "Registers and spills": resource_table(usage),
        "Roofline": f"![Modelled roofline]({picture.relative_to(PAGE.parent)})",
    }
    generated = "\n\n".join(f"## {title}\n\n{text}" for title, text in parts.items())
    before, _, after = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{generated}\n\n{END}{after.partition(END)[2]}")


def draw(rows: list[dict[str, Any]], picture: Path) -> None:
    """Operations per byte of DRAM against modelled operations a second, one panel for each device."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.hashsalt": "idlora", "svg.fonttype": "none"})  # same figures, same picture
    devices = kernel_library.simulator().roofline.DEVICES
    figure, panels = pyplot.subplots(1, len(ARCHITECTURES), figsize=(14, 4), sharey=True, layout="constrained")
    for panel, name in zip(panels, ARCHITECTURES, strict=True):
        device = devices[name]
        peak, bandwidth = device["mma_tflops"] * (device["mma_sync"] or 1), device["hbm_gbs"] / 1e3
        intensity = [1, peak / bandwidth, 1000]
        panel.loglog(intensity, [min(peak, i * bandwidth) for i in intensity], color="black", linewidth=1)
        for phase, colour in (("forward", "tab:blue"), ("backward", "tab:orange")):
            mine = [row for row in rows if row["phase"] == phase]
            panel.scatter(
                [row["modelled"][name]["flops"] / row["dram_bytes"] for row in mine],
                [row["modelled"][name]["flops"] / row["modelled"][name]["seconds"] / 1e12 for row in mine],
                s=[8 + 8 * len(str(row["N"])) for row in mine],
                color=colour,
                alpha=0.7,
                label=f"{phase}, modelled",
            )
        panel.set(title=name, xlabel="FLOP per byte of DRAM")
        panel.grid(True, which="major", alpha=0.3)
    panels[0].set_ylabel("TFLOP/s")
    panels[0].legend(loc="upper left", fontsize="small")
    figure.suptitle(
        "Modelled, not measured. Lines: DRAM and tensor cores at peak rates. Dots grow with the number of tokens."
    )
    figure.savefig(picture, metadata={"Date": None})
    pyplot.close(figure)
