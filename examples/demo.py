"""Fine-tune a real language model on real text, see what changed, save it, and load it again in a fresh process.

SmolLM2-135M-Instruct learns to answer in the way of GSM8K, from 80 worked problems, on a CPU in a few minutes: short
steps, sums in << >> and the result after ####. ``--quick`` takes only a few steps. Exits with 1 if the loss on
problems it has never seen does not fall, or if the reloaded adapter answers differently.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

# Before torch is loaded: threads that wait must not spin, or one other busy process makes a step ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from assets import gsm8k, smollm2
from transformers.utils import logging

from idlora_ext.cli import print_answers
from idlora_ext.tools.finetune import Settings, finetune
from idlora_ext.tools.generation import compare

HELD_OUT = 20  # problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps only: does it work at all?")
    parser.add_argument("--output", default="runs/demo", metavar="DIR", help="(default: runs/demo)")
    args = parser.parse_args()
    steps, held_out, new_tokens = (6, 5, 32) if args.quick else (40, HELD_OUT, 128)
    started = time.perf_counter()
    logging.disable_progress_bar()

    section("1. A real model and real data")
    model, problems = smollm2(), gsm8k()
    output = Path(args.output)
    data = output.parent / f"{output.name}-data"
    train_file = write(data / "train.jsonl", problems[:-HELD_OUT])
    held_out_file = write(data / "held_out.jsonl", problems[-held_out:])
    print(f"SmolLM2-135M-Instruct in {model}\nGSM8K: {len(problems)} problems in {data}")

    section("2. Fine-tuning")
    settings = Settings(
        model=str(model),
        data=[train_file],
        held_out_file=held_out_file,
        output=str(output),
        overwrite=True,
        chat=True,
        steps=steps,
        every=max(6, steps // 5),
        lr=1e-3,
        warmup=2 if args.quick else 4,
        adapter={"r": 32},  # the default, 128, is for models of 3B and more; here layers are 192 to 1536 wide
    )
    result = finetune(settings)

    section("3. A problem it has never seen")
    prompt = min((problem["prompt"] for problem in problems[-held_out:]), key=len)
    answers = compare(result.model, result.tokenizer, [prompt], chat=True, max_new_tokens=new_tokens)
    print_answers(answers)

    section("4. The saved adapter in a fresh process")
    command = [sys.executable, "-m", "idlora_ext", "generate", str(model), "--adapter", str(output), "--chat", "--json"]
    options = ["--prompt", prompt, "--max-new-tokens", str(new_tokens)]
    fresh = subprocess.run([*command, *options], capture_output=True, text=True)
    if fresh.returncode:
        return fail(f"the fresh process ended with {fresh.returncode}: {fresh.stderr.strip()}")
    same = json.loads(fresh.stdout) == answers
    print("Both answers are the same, word for word." if same else f"It says something else: {fresh.stdout}")

    section("In short")
    loss, metrics = result.metrics["held_out_loss"], result.metrics
    size = (output / "adapter_model.safetensors").stat().st_size
    print(
        f"loss on {held_out} unseen problems   {loss['before']:.3f} -> {loss['after']:.3f} nats per token\n"
        f"trainable parameters       {metrics['trainable_parameters']:,} of {metrics['total_parameters']:,}\n"
        f"adapter file               {size / 2**20:.1f} MiB\n"
        f"time                       {metrics['seconds']:.0f} s of training at {metrics['tokens_per_second']:.0f} "
        f"tokens/s, {time.perf_counter() - started:.0f} s in all\n"
        f"look at                    {output}/loss.png, idlora inspect {output} --base {model}"
    )
    if not loss["after"] < loss["before"]:
        return fail("the held-out loss did not fall")
    if answers[0]["base"] == answers[0]["adapted"]:
        return fail("the adapter changed nothing in the answer")
    if not same:
        return fail("the reloaded adapter answers differently")
    return 0


def section(title: str) -> None:
    print(f"\n=== {title}", flush=True)


def write(path: Path, records: list[dict[str, str]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def fail(reason: str) -> int:
    print(f"\ndemo failed: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
