"""Run what is missing of a study, one process an experiment, several side by side.

    python -m benchmarks.compare lr --jobs 2 --threads 1
    python -m benchmarks.compare quality --until 21:30

Stopping it (ctrl-C) loses the experiments that are running and nothing else; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from . import RESULTS, ROOT
from .experiment import ENCODER, MODEL, Experiment
from .methods import config
from .studies import STUDIES, Results, base_experiment, declared

Running = dict[str, tuple[Experiment, subprocess.Popen, Path]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--jobs", type=int, default=2, help="experiments side by side (default: 2)")
    parser.add_argument("--threads", type=int, default=1, help="of each (default: 1)")
    parser.add_argument("--limit", type=int, help="start at most so many experiments")
    parser.add_argument("--until", metavar="HH:MM", help="start none after this time of the day")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="start only experiments of these methods")
    parser.add_argument("--redo", action="store_true", help="replace results of other settings or other code")
    parser.add_argument("--list", action="store_true", help="say what is there and what is missing")
    parser.add_argument("--model", default=MODEL, help=f"{MODEL}, {ENCODER}, or a directory")
    parser.add_argument("--steps", type=int, default=Experiment.steps)
    parser.add_argument("--dtype", default=Experiment.dtype)
    parser.add_argument("--device", default=Experiment.device)
    parser.add_argument("--results", type=Path, default=RESULTS, help="(default: benchmarks/results/compare)")
    options = parser.parse_args()
    fields = {name: getattr(options, name) for name in ("model", "steps", "dtype", "device")}
    try:
        return Runner(options, base_experiment(**fields)).run()
    except (ValueError, OSError) as error:
        parser.exit(2, f"{error}\n")


def end_of(clock: str | None) -> float:
    """The next time that a clock will show ``HH:MM``."""
    if clock is None:
        return float("inf")
    now = time.localtime()
    try:
        at = time.strptime(clock, "%H:%M")
    except ValueError:
        raise ValueError(f"--until must be HH:MM, got {clock!r}") from None
    minutes = (at.tm_hour - now.tm_hour) * 60 + at.tm_min - now.tm_min
    return time.time() + minutes % (24 * 60) * 60 - now.tm_sec


class Runner:
    """Keeps ``--jobs`` experiments going until nothing is missing, or time or number is used up."""

    def __init__(self, options: argparse.Namespace, base: Experiment) -> None:
        self.options, self.base = options, base
        self.results = Results(options.results)
        self.end, self.started = end_of(options.until), 0
        self.running: Running = {}
        self.failed: dict[str, str] = {}  # name: why

    def find(self, experiment: Experiment) -> dict | None:
        try:
            return self.results.find(experiment, self.options.study)
        except ValueError:
            if self.options.redo:
                return None
            raise

    def missing(self) -> tuple[list[Experiment], int]:
        """What is to be run, in order, and how many there are with those that are done."""
        everything = declared(self.options.study, self.base, self.find)
        todo, done = [], 0
        for experiment in everything:
            if self.options.only and experiment.method not in self.options.only:
                continue
            if experiment.name in self.failed:
                continue
            try:
                config(experiment.adapter)
            except ValueError as error:
                self.failed[experiment.name] = f"cannot be run here: {error}"
                continue
            if self.find(experiment) is None:
                todo.append(experiment)
            else:
                done += 1
        return todo, done + len(todo)

    def run(self) -> int:
        todo, total = self.missing()
        for name, why in self.failed.items():
            print(f"{name} {why}", file=sys.stderr)
        if self.options.list:
            print(*(experiment.name for experiment in todo), f"{len(todo)} of {total} to be run", sep="\n")
            return 0
        with tqdm(total=total, initial=total - len(todo), desc=self.options.study, unit="run", smoothing=0) as bar:
            try:
                while True:
                    self.start([experiment for experiment in todo if experiment.name not in self.running])
                    bar.set_postfix_str(", ".join(self.running))
                    if not self.running:
                        break
                    self.wait_for_one(bar)
                    todo, bar.total = self.missing()  # the finished one may decide further ones
            finally:
                for _, process, _ in self.running.values():
                    process.terminate()
        print(f"{len(todo)} of {total} still to be run", file=sys.stderr)
        for name, why in self.failed.items():
            print(f"{name} {why}", file=sys.stderr)
        return int(bool(self.failed))

    def start(self, todo: list[Experiment]) -> None:
        while todo and len(self.running) < self.options.jobs:
            if time.time() >= self.end or self.started == self.options.limit:
                return
            experiment = todo.pop(0)
            log = Path(tempfile.mkstemp(prefix="compare-", suffix=".log")[1])
            threads = str(self.options.threads)
            command = [
                sys.executable,
                "-m",
                "benchmarks.compare.run",
                json.dumps(asdict(experiment)),
                "--threads",
                threads,
            ]
            command += ["--output", str(self.results.path(experiment, self.options.study).resolve())]
            # Threads that wait must not spin, or one process beside makes a step many times as long.
            environment = os.environ | {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}
            with log.open("w") as file:
                process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
            self.running[experiment.name] = experiment, process, log
            self.started += 1

    def wait_for_one(self, bar: tqdm) -> None:
        while True:
            for name, (_, process, log) in self.running.items():
                if process.poll() is None:
                    continue
                del self.running[name]
                if process.returncode:
                    lines = log.read_text(errors="replace").strip().splitlines()
                    self.failed[name] = f"failed, see {log}: {lines[-1] if lines else process.returncode}"
                    bar.write(f"{name} {self.failed[name]}", file=sys.stderr)
                else:
                    log.unlink()
                    bar.update()
                return
            time.sleep(0.2)
            bar.refresh()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as ctrl-C: no experiment goes on without a study
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
