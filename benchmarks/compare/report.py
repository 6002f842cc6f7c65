"""All results in tables and plots: ``benchmarks/results/compare/README.md`` and pictures beside it.

    python -m benchmarks.compare.report

A cell is a mean over seeds with the sample standard deviation; how many seeds there are stands beside it wherever any
are missing. Differences are paired: the same task, seed, rows and steps, only the method differs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.table import table

from . import RESULTS, cost, roofline
from .experiment import ENCODER, MODEL, Experiment
from .methods import LADDER, METHODS
from .studies import (
    ABLATED,
    CLOSE,
    MORE_SEEDS,
    SEEDS,
    Results,
    ablation_groups,
    base_experiment,
    best_rate,
    loss_after,
    losses_by_rate,
    quality,
    quality_tasks,
    seeds,
    telling,
)
from .tasks import HEADLINES, TASKS

REFERENCES = ("lora-r8", "lora-r4", "miss-r8")  # what differences are to; the last two are as small as r=32
Result = dict[str, Any]


class Report:
    """Tables of what is in a folder, for one model and one number of steps."""

    def __init__(self, folder: Path, base: Experiment) -> None:
        self.results, self.base, self.folder = Results(folder), base, folder
        self.prefix = "" if base.model == MODEL else f"{Path(base.model).name}--"  # each model has a report of its own
        self.stale: list[str] = []
        self.found: dict[str, Result] = {}  # by key: each counts once, however often it is looked up

    def find(self, experiment: Experiment, study: str = "lr") -> Result | None:
        """A result that is of this very experiment; others are named at the end of the report."""
        try:
            result = self.results.find(experiment, study)
        except ValueError as error:
            self.stale.append(str(error))
            return None
        if result is not None:
            self.found[result["key"]] = result
        return result

    def write(self) -> Path:
        sections = [self.learning_rates(), self.quality(), self.ablations(), self.alpha()]
        sections += [self.cost(), self.roofline(), self.runs()]
        text = "\n\n".join([self.head(), *(section for section in sections if section), *self.tail()])
        path = self.folder / f"{self.prefix}README.md"
        path.write_text(text + "\n")
        return path

    def head(self) -> str:
        base, encoder = self.base, self.base.task == HEADLINES
        rows = f"{base.batch} headlines" if encoder else f"{base.batch} x {base.length} tokens"
        machines = sorted({result["machine"]["cpu"] for result in self.found.values()}) or ["no results yet"]
        return (
            "# ID-LoRA beside other methods\n\nWritten by `python -m benchmarks.compare.report`; do not edit.\n\n"
            f"{Path(base.model).name}, {base.dtype}, {base.steps} steps of {rows}, AdamW without weight decay, "
            "gradients clipped to norm 1, cosine schedule after a tenth of warm-up, for every method alike (`run.py`). "
            f"Machines: {', '.join(machines)}. Losses are nats per {'headline' if encoder else 'token'}, held out."
        )

    def tail(self) -> list[str]:
        if not self.stale:
            return []
        return ["## Left out\n\n" + "\n".join(f"* {line}" for line in sorted(set(self.stale)))]

    def learning_rates(self) -> str:
        """Loss of every method at every rate that was tried, the best in bold, edges marked."""
        sections = []
        for task in quality_tasks(self.base):
            rows = []
            for method in METHODS:
                tried = losses_by_rate(method, task, self.base, self.find)
                if not tried:
                    continue
                best = min(tried, key=tried.__getitem__)
                edge = best in (min(tried), max(tried)) and best not in (LADDER[0], LADDER[-1])
                cells = [f"{tried[rate]:.4f}" if rate in tried else "" for rate in LADDER]
                cells[LADDER.index(best)] = f"**{tried[best]:.4f}**"
                rows.append([method, *cells, f"{best:g}" + (" (at the edge of what was tried)" if edge else "")])
            if rows:
                head = ["method", *(f"{rate:g}" for rate in LADDER), "best"]
                sections.append(f"### {task}\n\n{table(head, rows)}")
        return "\n\n".join([f"## Learning rates: held-out loss, seed {SEEDS[0]}", *sections]) if sections else ""

    def quality(self) -> str:
        sections, of_tasks = [], {}
        experiments = list(quality(self.base, self.find))
        for task in quality_tasks(self.base):
            of_task: dict[str, dict[int, Result]] = {}
            for experiment in experiments:
                if experiment.task == task and (result := self.find(experiment, "quality")) is not None:
                    of_task.setdefault(experiment.method, {})[experiment.seed] = result
            if not set(of_task) - {"none"}:
                continue
            rows = [self._quality_row(task, method, runs, of_task) for method, runs in of_task.items()]
            less = (f"minus {name}" for name in REFERENCES)
            head = ["method", "lr", "parameters", "held-out loss", *less, "accuracy"]
            parts = TASKS[task] if len(TASKS[task]) > 1 else ()
            sections.append(f"### {task}\n\n" + table([*head, *(f"loss: {part}" for part in parts)], rows))
            name = f"{self.prefix}quality_{task}.svg"
            plot_losses(task, of_task, self.folder / name)
            sections[-1] += f"\n\n![losses of each seed]({name})"
            of_tasks[task] = of_task
        if not sections:
            return ""
        name = f"{self.prefix}differences.svg"
        if plot_differences(of_tasks, self.folder / name):
            sections.append(f"### Paired differences\n\n![paired differences]({name})")
        note = f"Seeds {', '.join(map(str, SEEDS))}; mean ± standard deviation; (n of m) if any are missing. "
        for task, methods in CLOSE.items():
            if task in quality_tasks(self.base):
                note += f"On {task} also seeds {', '.join(map(str, MORE_SEEDS))} of {', '.join(methods)}. "
        note += f"Rates are the best on seed {SEEDS[0]} of the same task."
        pairs = [(task, method) for task in quality_tasks(self.base) for method in telling(task)]
        missing = [f"{m} on {task}" for task, m in pairs if best_rate(m, task, self.base, self.find) is None]
        if missing:
            note += f" Not run, since their rates are not all tried: {', '.join(missing)}."
        return "\n\n".join([f"## Quality, each method at its best rate\n\n{note}", *sections])

    def _quality_row(
        self, task: str, method: str, runs: dict[int, Result], of_task: dict[str, dict[int, Result]]
    ) -> list[str]:
        wanted = len(seeds(task, method))
        any_run = next(iter(runs.values()))
        metrics = [result["metrics"] for result in runs.values()]
        row = [method, f"{any_run['settings']['lr']:g}", f"{metrics[0]['trainable_parameters']:,}"]
        row.append(spread(map(loss_after, runs.values()), wanted))
        for reference in REFERENCES:
            pairs = [] if method in (reference, "none") else differences(runs, of_task.get(reference, {}))
            less = spread(pairs, min(wanted, len(seeds(task, reference))), sign=True)
            row.append(f"{less}; ahead in {sum(pair < 0 for pair in pairs)}" if pairs else "")
        names = list(metrics[0]["accuracy"])
        cells = {name: spread((m["accuracy"][name] for m in metrics), wanted, 3) for name in names}
        row.append("; ".join(f"{name} {cell}" if len(names) > 1 else cell for name, cell in cells.items()))
        parts = [name for name in metrics[0]["held_out_curve"]["0"] if name != "share_of_rows"]
        if len(parts) > 1:
            row += [spread((list(m["held_out_curve"].values())[-1][part] for m in metrics), wanted) for part in parts]
        return row

    def ablations(self) -> str:
        groups: dict[str, list[Experiment]] = {}
        for group, experiment in ablation_groups(self.base, self.find):
            groups.setdefault(group, []).append(experiment)
        rows, missing = [], []
        for group, experiments in groups.items():
            reference = next((e for e in experiments if not e.override), experiments[0])
            runs = {experiment.variant: self._seeds(experiment) for experiment in experiments}
            plain = runs[reference.variant]
            missing += [f"{setting(e)} ({group})" for e in experiments if not runs[e.variant]]
            there = [e for e in experiments if runs[e.variant]]
            if len(there) > 1:  # something to compare
                rows += [self._ablation_row(group, e, runs[e.variant], plain if e != reference else {}) for e in there]
        if not rows:
            return ""
        head = [
            "what",
            "setting",
            "lr",
            "parameters",
            "held-out loss",
            "minus the group's plain one",
            "a: mean; spread",
        ]
        note = (
            "Spread: over tokens, the median over layers. Layers too narrow for a rank have the largest that fits. "
            f"Rates are the best of {ABLATED}; of idlora-r32 for linear routers, of idlora-r32-static without center."
        )
        if missing:
            note += f" Not run yet: {'; '.join(missing)}."
        return f"## Ablations on {self.base.task}\n\n{note}\n\n" + table(head, rows)

    def _seeds(self, experiment: Experiment) -> dict[int, Result]:
        found = {seed: self.find(replace(experiment, seed=seed), "ablations") for seed in SEEDS}
        return {seed: result for seed, result in found.items() if result is not None}

    def _ablation_row(
        self, group: str, experiment: Experiment, runs: dict[int, Result], plain: dict[int, Result]
    ) -> list[str]:
        metrics = [result["metrics"] for result in runs.values()]
        last = [a for m in metrics if m["alpha"] for a in m["alpha"][max(m["alpha"], key=int)].values()]
        alpha = "; ".join(f"{statistics.mean(a[key] for a in last):.3f}" for key in ("mean", "spread")) if last else ""
        loss = spread(map(loss_after, runs.values()), len(SEEDS))
        less = spread(differences(runs, plain), len(SEEDS), sign=True)
        parameters = f"{metrics[0]['trainable_parameters']:,}"
        return [group, setting(experiment), f"{experiment.lr:g}", parameters, loss, less, alpha]

    def alpha(self) -> str:
        """The router's weights over training, of each method that has a router, on every task it was trained on."""
        curves: list[tuple[list[str], dict[str, dict[str, float]]]] = []
        for method in METHODS:
            if METHODS[method].adapter.get("router", "static") == "static":
                continue
            for task in quality_tasks(self.base):
                losses = losses_by_rate(method, task, self.base, self.find)
                if not losses:
                    continue
                rate = min(losses, key=losses.__getitem__)
                result = self.find(replace(self.base, method=method, task=task, lr=rate))
                alpha = result["metrics"]["alpha"] if result else {}
                for part in TASKS[task] if alpha else ():
                    trained = task if part == task else f"{task}: {part}"
                    curve = {step: found[part] for step, found in alpha.items()}
                    curves.append(([method, f"{rate:g}", trained], curve))
        if not curves:
            return ""
        steps = sorted({step for _, curve in curves for step in curve}, key=int)
        rows = []
        for row, curve in curves:
            for step in steps:  # a run that diverged ends early
                row.append("{mean:.3f}; {spread:.3f}; {clusters:.3f}".format(**curve[step]) if step in curve else "")
            rows.append([*row, f"{curve[max(curve, key=int)]['largest']:.3g}"])
        head = ["method", "lr", "task", *(f"step {step}" for step in steps), "largest at the end"]
        note = f"Seed {SEEDS[0]}, at the best rate so far. Mean; spread over tokens; spread over clusters: medians over"
        return f"## The router's weights over training\n\n{note} layers.\n\n" + table(head, rows)

    def cost(self) -> str:
        """What ``cost.py`` has measured, if it was of this model."""
        file = self.folder / "cost.json"
        if not file.is_file() or (result := json.loads(file.read_text()))["settings"]["model"] != self.base.model:
            return ""
        s, machine = result["settings"], result["machine"]
        note = (
            f"`python -m benchmarks.compare.cost`: {Path(s['model']).name}, {s['dtype']}, {s['threads']} thread(s), "
            f"batch {s['batch']} x {s['length']}, on {machine['gpus'] or machine['cpu']}; medians of {s['repeats']} "
            "fresh processes that take turns, 20th and 80th percentiles in brackets. Frozen: forward, and backward to "
            "the embeddings."
        )
        return f"## Cost, measured\n\n{note}\n\n{cost.page(result)}"

    def roofline(self) -> str:
        """What ``roofline.py`` has counted."""
        file = self.folder / "roofline.json"
        if not file.is_file():
            return ""
        result = json.loads(file.read_text())
        s = result["settings"]
        note = (
            "`python -m benchmarks.compare.roofline`: a model by counted bytes and flops, nothing measured. One "
            f"decoder layer of Llama-3-8B, {s['dtype']}, batch {s['batch']} x {s['length']}, all linear layers; every "
            f"operator at {s['bandwidth'] / 1e12:g} TB/s or {s['peak'] / 1e12:g} TFLOP/s, an H100's limits."
        )
        return f"## Cost, modelled for an H100\n\n{note}\n\n{roofline.page(result['counts'])}"

    def runs(self) -> str:
        """What a run took, medians over all runs of a method: beside others on the machine, so only for orientation."""
        rows = []
        for method in METHODS:
            runs = [r for r in self.found.values() if r["variant"] == method and r["train"]["loss"]]
            if not runs:
                continue
            median = [
                statistics.median(values)
                for values in (
                    [r["metrics"]["adapter_bytes"] / 1e6 for r in runs],
                    [r["train"]["gradient_norm"][0] for r in runs],
                    [r["train"]["cpu_seconds"] / len(r["train"]["loss"]) for r in runs],
                    [r["train"]["adapt_cpu_seconds"] for r in runs],
                    [r["run"]["peak_rss_bytes"] / 2**30 for r in runs],
                )
            ]
            parameters = f"{runs[0]['metrics']['trainable_parameters']:,}"
            rows.append([method, parameters, *(f"{value:.3g}" for value in median), str(len(runs))])
        measured = ["file, MB", "first gradient norm", "CPU s a step", "adapting, CPU s", "peak GiB"]
        head = ["method", "parameters", *measured, "runs"]
        note = "Not a benchmark of speed: runs shared the machine. Adapting is nearly all row choice in ID-LoRA."
        return f"## Runs\n\n{note}\n\n" + table(head, rows) if rows else ""


def differences(runs: dict[int, Result], reference: dict[int, Result]) -> list[float]:
    """Loss minus the reference's of the same seed."""
    return [loss_after(runs[seed]) - loss_after(reference[seed]) for seed in runs if seed in reference]


def setting(experiment: Experiment) -> str:
    """What differs from the method, or its name."""
    differs = sorted(experiment.override.items())
    shown = (f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in differs)
    return ", ".join(shown) or experiment.method


def spread(values: Iterable[float], wanted: int, digits: int = 4, sign: bool = False) -> str:
    """``mean ± deviation``, and how many values there are if not all, or more than elsewhere."""
    values = list(values)
    if not values:
        return ""
    if not all(map(math.isfinite, values)):
        return "diverged"
    text = f"{statistics.mean(values):{'+' if sign else ''}.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    if len(values) < wanted:
        return f"{text} ({len(values)} of {wanted})"
    return f"{text} ({wanted} seeds)" if wanted > len(SEEDS) else text


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


def _draw_row(axes: Any, at: int, method: str, values: list[float]) -> None:
    """Mean and standard deviation of a method, and a tick for each seed; nothing of one that diverged."""
    if values and all(map(math.isfinite, values)):
        colour = "#c2410c" if method.startswith("idlora") else "#475569"
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        axes.errorbar(statistics.mean(values), at, xerr=deviation, fmt="o", color=colour, capsize=3)
        axes.plot(values, [at] * len(values), "|", color=colour, markersize=9)


def plot_losses(task: str, of_task: dict[str, dict[int, Result]], path: Path) -> None:
    """Losses of each method, in the order of their trainable parameters."""
    figure, [axes] = _panels(1)
    axes.set(title=f"{task}: held-out loss", xlabel="each seed, mean ± standard deviation; left is better")
    parameters = {m: next(iter(runs.values()))["metrics"]["trainable_parameters"] for m, runs in of_task.items()}
    methods = sorted((m for m in of_task if m != "none"), key=lambda m: (-parameters[m], list(METHODS).index(m)))
    for at, method in enumerate(methods):
        _draw_row(axes, at, method, [loss_after(result) for result in of_task[method].values()])
    axes.set_yticks(range(len(methods)), [f"{m}, {parameters[m] / 1e6:.2f} M" for m in methods])
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
            _draw_row(axes, at, method, differences(of_task.get(method, {}), of_task[REFERENCES[0]]))
        axes.axvline(0, color="black", linewidth=1)
    panels[0].set_yticks(range(len(methods)), methods[::-1])
    figure.savefig(path, metadata={"Date": None})
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help=f"{MODEL}, {ENCODER}, or a directory")
    parser.add_argument("--steps", type=int, default=Experiment.steps)
    parser.add_argument("--dtype", default=Experiment.dtype)
    parser.add_argument("--device", default=Experiment.device)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    fields = {name: getattr(options, name) for name in ("model", "steps", "dtype", "device")}
    print(Report(options.results, base_experiment(**fields)).write())


if __name__ == "__main__":
    main()
