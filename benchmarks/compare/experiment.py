"""One experiment: the settings that decide its result, its name, its file."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from .methods import METHODS, Adapter, behaviour, same_behaviour
from .tasks import task_digest

MODEL, ENCODER = "smollm2-135m", "minilm-l6"  # fetched from PyPI, see examples/assets.py; other names are directories


@dataclass(frozen=True)
class Experiment:
    """Args:
    method: a name of ``METHODS``; ``override`` holds the fields of its adapter that differ, as an ablation's do.
    model: ``smollm2-135m``, ``minilm-l6``, or the directory of a causal language model or an encoder.
    steps, batch, length: rows of ``length`` tokens, of headlines of at most so many; ``batch`` rows a step.
    """

    method: str
    task: str
    lr: float
    seed: int = 0
    override: dict[str, Any] = field(default_factory=dict)
    model: str = MODEL
    steps: int = 60
    batch: int = 4
    length: int = 128
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def adapter(self) -> Adapter:
        return METHODS[self.method].adapter | self.override

    @property
    def variant(self) -> str:
        """Method and what differs from it: ``idlora-r32,num_clusters=2``."""
        return ",".join([self.method, *(f"{name}={value}" for name, value in sorted(self.override.items()))])

    @property
    def name(self) -> str:
        model = "" if self.model == MODEL else f"{Path(self.model).name}--"
        return f"{model}{self.task}--{self.variant}--lr{self.lr:g}--seed{self.seed}"

    def settings(self) -> dict[str, Any]:
        """All that decides the result, as it stands in the results file."""
        path = model_path(self.model)
        decisive = asdict(self) | {"adapter": self.adapter, "model": Path(self.model).name}
        del decisive["override"], decisive["method"]  # the adapter says it all
        digests = {"model": model_digest(path), "task": task_digest(self.task, path, self.length)}
        return json.loads(json.dumps(decisive | {"digests": digests}))

    def key(self) -> str:
        """A hash of the settings."""
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:16]

    def file(self, directory: Path) -> Path:
        return directory / f"{self.name}.json"

    def verdict(self, result: dict[str, Any]) -> str | None:
        """Why a result is not this experiment's, in words; None if it is."""
        if result["key"] != self.key():
            ours, theirs = self.settings(), result["settings"]
            names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
            return "; ".join(f"{name} was {theirs.get(name)!r} and is {ours.get(name)!r}" for name in names)
        found = adapter_behaviour(json.dumps(self.adapter))
        if not same_behaviour(found, result["behaviour"]):
            return f"the adapter's code computes {found} on a small fixed model, and was {result['behaviour']}"
        return None


@cache
def adapter_behaviour(adapter: str) -> list[float]:
    return behaviour(json.loads(adapter))


@cache
def model_path(model: str) -> Path:
    """Raises ValueError if there is no such directory."""
    if model in (MODEL, ENCODER):
        from assets import minilm, smollm2

        return smollm2() if model == MODEL else minilm()
    path = Path(model).resolve()
    if not (path / "config.json").is_file():
        raise ValueError(
            f"--model: {path} is not the directory of a model (no config.json); or say {MODEL} or {ENCODER}"
        )
    return path


@cache
def model_digest(path: Path) -> str:
    """A hash of the weights and the architecture, whichever transformers wrote them down."""
    architecture = json.loads((path / "config.json").read_text())
    architecture.pop("transformers_version", None)
    sha = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                sha.update(block)
    return sha.hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    """Complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(aside, path)
