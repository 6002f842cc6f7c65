"""The report's plots: loss over parameters, and paired differences."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from .methods import METHODS
from .studies import SEEDS, loss_after

REFERENCES = ("lora-r8", "lora-r4", "miss-r8")  # what differences are to; the last two are as small as r=32
Result = dict[str, Any]


def differences(runs: dict[int, Result], reference: dict[int, Result]) -> list[float]:
    """Loss minus the reference's of the same seed."""
    return [loss_after(runs[seed]) - loss_after(reference[seed]) for seed in runs if seed in reference]


def _panels(number: int) -> tuple[Any, list[Any]]:
    """A figure of so many panels side by side, which share what is on the left."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "idlora"  # the same results, the same file
    figure = Figure(figsize=(3.6 + 3.4 * number, 4.2), layout="constrained")
    panels = figure.subplots(1, number, sharey=True, squeeze=False)[0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e5e7eb")
    return figure, list(panels)


def _colour(method: str) -> str:
    return "#c2410c" if method.startswith("idlora") else "#475569"


def _bars(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def plot_parameters(task: str, of_task: dict[str, dict[int, Result]], path: Path) -> None:
    """Loss over trainable parameters."""
    figure, [axes] = _panels(1)
    title = f"{task}: mean and standard deviation over seeds"
    axes.set(title=title, xlabel="trainable parameters", ylabel="held-out loss", xscale="log")
    axes.margins(0.2)
    for method, runs in of_task.items():
        count = next(iter(runs.values()))["metrics"]["trainable_parameters"]
        losses = [loss_after(result) for result in runs.values()]
        if count and all(map(math.isfinite, losses)):
            mean, deviation = _bars(losses)
            axes.errorbar(count, mean, deviation, fmt="o", color=_colour(method), capsize=3)
            label = method if len(runs) == len(SEEDS) else f"{method} ({len(runs)} of {len(SEEDS)})"
            # Methods of as many parameters lie close to one another.
            side = "right" if method == "lora-r4" else "left"
            at = (-6, -3) if side == "right" else (5, -11 if method.startswith("idlora") else 4)
            axes.annotate(label, (count, mean), at, textcoords="offset points", fontsize="small", ha=side)
    figure.savefig(path, metadata={"Date": None})


def plot_differences(of_tasks: dict[str, dict[str, dict[int, Result]]], path: Path) -> bool:
    """Paired differences to the first reference, a panel for each task; False if there are none."""
    of_tasks = {task: of_task for task, of_task in of_tasks.items() if of_task.get(REFERENCES[0])}
    methods = [m for m in METHODS if m not in (REFERENCES[0], "none") and any(m in of for of in of_tasks.values())]
    if not methods:
        return False
    figure, panels = _panels(len(of_tasks))
    for axes, (task, of_task) in zip(panels, of_tasks.items(), strict=True):
        axes.set(title=f"{task}: loss minus that of {REFERENCES[0]}", xlabel="left is better")
        for at, method in enumerate(reversed(methods)):
            values = differences(of_task.get(method, {}), of_task[REFERENCES[0]])
            if values and all(map(math.isfinite, values)):
                mean, deviation = _bars(values)
                colour = _colour(method)
                axes.errorbar(mean, at, xerr=deviation, fmt="o", color=colour, capsize=3)
                axes.plot(values, [at] * len(values), "|", color=colour, markersize=9)
        axes.axvline(0, color="black", linewidth=1)
    panels[0].set_yticks(range(len(methods)), methods[::-1])
    figure.savefig(path, metadata={"Date": None})
    return True
