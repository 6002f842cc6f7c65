"""What a fine-tuning run tells while it runs, and what it leaves: metrics and a loss curve."""

from __future__ import annotations

import math
import platform
import resource
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import (
    Trainer,
    TrainerCallback,
)

from .. import lifecycle
from ..version import __version__
from .data import Rows

CURVES = {"train": "loss", "held_out": "eval_loss"}  # our names and the Trainer's


class Report(TrainerCallback):
    """Progress bar, one line for each evaluation, and the time and tokens of the training steps alone."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tokens = 0
        self._train_loss = math.nan
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            raise ValueError(f"already at step {state.global_step} of {state.max_steps}: ask for more steps")
        self._first_token = state.num_input_tokens_seen
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="Training", unit="step", disable=None)
        print(f"{'step':>8} {'train loss':>11} {'held-out loss':>14} {'perplexity':>11} {'tokens/s':>9}")

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds += time.perf_counter() - self._started
        self.tokens = state.num_input_tokens_seen - self._first_token
        self._bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self._train_loss = logs["loss"]
            self._bar.set_postfix(loss=f"{self._train_loss:.3f}")
            if not math.isfinite(self._train_loss):
                raise ValueError(f"loss {self._train_loss} at step {state.global_step}: try a lower learning rate")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        train, speed = "-", "-"
        if self.seconds:
            train, speed = f"{self._train_loss:.4f}", f"{self.tokens / self.seconds:,.0f}"
        step, loss = f"{state.global_step}/{state.max_steps}", metrics["eval_loss"]
        self._bar.write(f"{step:>8} {train:>11} {loss:>14.4f} {_perplexity(loss):>11.3f} {speed:>9}")

    def close(self) -> None:
        """End the progress bar, also after a failure."""
        if self._bar is not None:
            self._bar.close()


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def metrics_of(run: dict[str, Any], trainer: Trainer, report: Report, train: Rows, held_out: Rows) -> dict[str, Any]:
    curve = [
        {"step": entry["step"], name: entry[key]}
        for entry in trainer.state.log_history
        for name, key in CURVES.items()
        if key in entry
    ]
    losses = [point["held_out"] for point in curve if "held_out" in point]
    summary = lifecycle.summary(trainer.model)
    packages = ("torch", "transformers", "peft", "accelerate")
    return {
        "held_out_loss": {"before": losses[0], "after": losses[-1]},
        "held_out_perplexity": {"before": _perplexity(losses[0]), "after": _perplexity(losses[-1])},
        "steps": trainer.state.global_step,
        "trainable_parameters": summary.trainable_parameters,
        "total_parameters": summary.total_parameters,
        "seconds": round(report.seconds, 3),  # training steps alone, of this session if the run was resumed
        "tokens_per_second": round(report.tokens / report.seconds, 1),
        "data": {
            part: {"rows": len(rows), "tokens": rows.tokens, "targets": rows.targets}
            for part, rows in (("train", train), ("held_out", held_out))
        },
        "peak_memory_bytes": _peak_memory(),
        "curve": curve,
        "settings": run,
        "device": str(trainer.args.device),
        "versions": {
            "idlora_ext": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
    }


def _peak_memory() -> int:
    """The most memory taken on the CUDA device, else by the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def plot_curve(curve: Sequence[dict[str, float]], path: Path) -> None:
    """Draw training and held-out loss over the steps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    train, held_out = ([(point["step"], point[name]) for point in curve if name in point] for name in CURVES)
    axes.plot(*zip(*train, strict=True), label="training", color="#9aa5b1", linewidth=1.2)
    axes.plot(*zip(*held_out, strict=True), label="held out", color="#c2410c", linewidth=2, marker="o", markersize=4.5)
    for (step, loss), side in ((held_out[0], "left"), (held_out[-1], "right")):
        axes.annotate(f"{loss:.3f}", (step, loss), (0, 8), textcoords="offset points", ha=side, color="#c2410c")
    axes.set(xlabel="step", ylabel="loss per token (nats)", title="ID-LoRA fine-tuning")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb")
    axes.legend(frameon=False)
    figure.savefig(path)
