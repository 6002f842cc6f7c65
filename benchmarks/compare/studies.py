"""The studies: which experiments, the most telling first, so that one stopped early still has whole comparisons."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from .experiment import Experiment, model_path
from .methods import LADDER, METHODS
from .objectives import is_encoder
from .tasks import HEADLINES

SEEDS = (0, 1, 2)
# Further seeds where three leave open which of the methods of one size is ahead.
MORE_SEEDS = (3, 4, 5)
CLOSE = {"sarcasm": ("miss-r8", "idlora-r32-bounded", "idlora-r32-pivoted")}
QUALITY_TASKS = ("math", "sarcasm", "mixture")
TELLING = (
    "lora-r8", "miss-r8", "idlora-r32-centered", "idlora-r32", "lora-r4", "idlora-r32-bounded", "idlora-r32-pivoted",
    "idlora-r32-static",
)  # fmt: skip
# Of four times as many parameters, on one task; not with an encoder, whose layers do not hold so many rows.
WIDER = ("lora-r32", "miss-r32", "idlora-r128-centered")
# What is named twice, as that with r=32, is one experiment. All differ from ABLATED.
ABLATED = "idlora-r32-centered"
ABLATIONS: dict[str, list[dict[str, Any]]] = {
    # The sum over k clusters has the size of sqrt(k) products, and Adam moves B by the same step whatever it is: the
    # scaling keeps the size of the update, and with it the rate that is best.
    "clusters": [{"num_clusters": k, "scaling": 2 / math.sqrt(k)} for k in (1, 2, 4, 8)],
    # An entry of y is a sum over r/s entries of z, which Adam moves alike: again the scaling keeps its size.
    "rank": [{"r": r, "scaling": 32 / r} for r in (8, 16, 32, 64, 128)],
    # s^2 times as many rows for the same B: r = 32 at s = 2 has the parameters of r = 8 at s = 1.
    "rank boost": [{"r": r, "rank_boost": s, "scaling": 16 * s / r} for r, s in ((8, 1), (32, 2), (128, 4))],
    # As many parameters in other layers (budget.py), on every task; another method, since it takes a table.
    "budget": [{}, {"method": "idlora-r32-budget"}],
    "router": [
        {"router": router, "center": center, "shared_router": shared}
        for router, center, shared in (
            ("static", True, True),
            ("static", True, False),
            ("static", False, True),
            ("linear", True, True),
            ("linear", False, True),
            ("linear", False, False),
            ("bounded", True, True),
        )
    ]
    + [{"router": "bounded", "row_scale": True, **rows} for rows in ({}, {"selection": "pivoted_qr_whole"})],
    "selection": [
        {"selection": selection, **scale}
        for selection in ("nearest", "random", "sequential", "pivoted_qr", "pivoted_qr_whole")
        for scale in ({}, {"row_scale": True})
    ],
    "scaling": [{"scaling": scaling} for scaling in (0.25, 0.5, 1.0, 2.0, 4.0)],
}


class Results:
    """All results files by what they are of: a study takes what another has measured already."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[Path, tuple[int, dict[str, Any]]] = {}

    def find(self, experiment: Experiment, study: str) -> dict[str, Any] | None:
        """The result of this very experiment, in the study's folder or in another's.

        Raises:
            ValueError: the study's file of this name is of an experiment with other settings or other code.
        """
        own = self.read(self.path(experiment, study))
        if own is not None:
            if why := experiment.verdict(own):
                path = self.path(experiment, study)
                raise ValueError(
                    f"{path} is of another experiment: {why}. Move it away, give another --results, or --redo"
                )
            return own
        key = experiment.key()
        everything = (self.read(file) for file in sorted(self.folder.glob("*/*.json")))
        return next((r for r in everything if r and r["key"] == key and not experiment.verdict(r)), None)

    def path(self, experiment: Experiment, study: str) -> Path:
        return experiment.file(self.folder / study)

    def read(self, file: Path) -> dict[str, Any] | None:
        if not file.is_file():
            return None
        changed = file.stat().st_mtime_ns
        if self._files.get(file, (0,))[0] != changed:
            self._files[file] = changed, json.loads(file.read_text())
        return self._files[file][1]


Find = Callable[[Experiment], dict[str, Any] | None]


def base_experiment(model: str, **fields: Any) -> Experiment:
    """What all experiments on a model have in common; the task is the one on which rates are looked for first."""
    if is_encoder(model_path(model)):
        return Experiment("none", HEADLINES, 0.0, model=model, batch=32, **fields)
    return Experiment("none", QUALITY_TASKS[0], 0.0, model=model, **fields)


def quality_tasks(base: Experiment) -> tuple[str, ...]:
    """The tasks on which the telling methods are compared, the base experiment's first."""
    return QUALITY_TASKS if base.task in QUALITY_TASKS else (base.task,)


def telling(task: str) -> tuple[str, ...]:
    """The methods that are compared on a task, seed by seed."""
    return (*TELLING, *WIDER) if task == QUALITY_TASKS[0] else TELLING


def seeds(task: str, method: str) -> tuple[int, ...]:
    """Those that a method is compared with on a task."""
    if method == "none":  # nothing is drawn
        return SEEDS[:1]
    return (*SEEDS, *MORE_SEEDS) if method in CLOSE.get(task, ()) else SEEDS


def loss_after(result: dict[str, Any]) -> float:
    """Held-out loss at the end; infinite for a run that diverged."""
    loss = result["metrics"]["held_out_loss"]["after"]
    return loss if math.isfinite(loss) else math.inf


def lr_study(base: Experiment, find: Find) -> Iterable[Experiment]:
    """Methods at three rates on one seed, then further out while the best is the last on its side.

    The telling methods first, since ``quality`` waits for them, on one task after the other; then the others of a
    language model on the first alone. A rate that is best on one task may fail on another: on those that follow a
    method starts from its best on the first.
    """
    compared = [(telling(task), task) for task in quality_tasks(base)]
    if base.task in QUALITY_TASKS:
        compared.append((tuple(m for m in METHODS if m not in (*TELLING, *WIDER, "none")), base.task))
    for methods, task in compared:
        yield replace(base, method="none", task=task, lr=0.0)
        starts = {method: _first_rates(method, task, base, find) for method in methods}
        for at in (1, 0, 2):  # the centres of all first
            for method, rates in starts.items():
                if at < len(rates):
                    yield replace(base, method=method, task=task, lr=rates[at])
        for method, rates in starts.items():
            yield from _further(replace(base, method=method, task=task), rates, find)


def _first_rates(method: str, task: str, base: Experiment, find: Find) -> tuple[float, ...]:
    """Those tried first: about the method's centre, or about its best on the first task; none before that is known."""
    centre = METHODS[method].centre if task == base.task else best_rate(method, base.task, base, find)
    if centre is None:
        return ()
    at = LADDER.index(centre)
    return LADDER[max(at - 1, 0) : at + 2]


def _further(base: Experiment, first: Iterable[float], find: Find) -> Iterable[Experiment]:
    rates = list(first)
    while rates:
        found = {rate: find(replace(base, lr=rate)) for rate in rates}
        if any(result is None for result in found.values()):
            return
        losses = {rate: loss_after(result) for rate, result in found.items() if result is not None}
        at = LADDER.index(min(losses, key=losses.__getitem__))
        wanted = [LADDER[i] for i in (at - 1, at + 1) if 0 <= i < len(LADDER) and LADDER[i] not in rates]
        if not wanted:
            return
        yield replace(base, lr=wanted[0])
        rates.append(wanted[0])


def losses_by_rate(method: str, task: str, base: Experiment, find: Find) -> dict[float, float]:
    """Losses at the rates that have been tried so far, with the first seed."""
    tried = {rate: find(replace(base, method=method, task=task, seed=SEEDS[0], lr=rate)) for rate in LADDER}
    return {rate: loss_after(result) for rate, result in tried.items() if result is not None}


def best_rate(method: str, task: str, base: Experiment, find: Find) -> float | None:
    """The best of the rates that ``lr`` has tried; None before those it begins with are there."""
    losses, first = losses_by_rate(method, task, base, find), _first_rates(method, task, base, find)
    return min(losses, key=losses.__getitem__) if first and set(first) <= set(losses) else None


def quality(base: Experiment, find: Find) -> Iterable[Experiment]:
    """The most telling methods on every task and seed, each at its best rate on that task: seed by seed."""
    tasks = quality_tasks(base)
    rates = {(task, method): best_rate(method, task, base, find) for task in tasks for method in telling(task)}
    for task in tasks:
        yield replace(base, method="none", task=task, lr=0.0)
    for seed in (*SEEDS, *MORE_SEEDS):
        for (task, method), rate in rates.items():
            if rate is not None and seed in seeds(task, method):
                yield replace(base, method=method, task=task, seed=seed, lr=rate)


def ablations(base: Experiment, find: Find) -> Iterable[Experiment]:
    """One thing of ID-LoRA r=32 changed at a time; seed by seed, so that all of it is soon there."""
    for seed in SEEDS:
        for _, experiment in ablation_groups(base, find):
            yield replace(experiment, seed=seed)


def ablation_groups(base: Experiment, find: Find) -> Iterable[tuple[str, Experiment]]:
    """Ablations with the name of their group, without seeds; at the best rate of the form of their products.

    All on the first task; the budget, which is kept if it wins on two, on the others as well.
    """
    given = METHODS[ABLATED].adapter
    for group, overrides in ABLATIONS.items():
        tasks = quality_tasks(base) if group == "budget" else (base.task,)
        for task, override in product(tasks, overrides):
            method = override.get("method", ABLATED)
            differs = {name: value for name, value in override.items() if name != "method" and given.get(name) != value}
            form = "idlora-r32-static" if override.get("center") is False else ABLATED
            if differs.get("router") == "linear":  # quadratic in the activation: of another size
                form = "idlora-r32"
            rate = best_rate(form, task, base, find)
            if rate is not None:
                label = group if task == base.task else f"{group}, {task}"
                yield label, replace(base, method=method, task=task, override=differs, lr=rate)


Study = Callable[[Experiment, Find], Iterable[Experiment]]
STUDIES: dict[str, Study] = {"lr": lr_study, "quality": quality, "ablations": ablations}


def declared(study: str, base: Experiment, find: Find) -> list[Experiment]:
    """Every experiment of a study, as far as what is there already decides them, once each.

    Raises:
        ValueError: it needs results of ``lr`` that are not there.
    """
    unique = {experiment.name: experiment for experiment in STUDIES[study](base, find)}
    if all(experiment.method == "none" for experiment in unique.values()):
        raise ValueError(f"{study} takes each method's best learning rate from lr: run lr first")
    return list(unique.values())
