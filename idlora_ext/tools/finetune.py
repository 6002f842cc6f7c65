"""Fine-tuning a causal language model from files: ``transformers.Trainer`` with ID-LoRA, and a record of the run."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from .. import lifecycle
from .data import IGNORED, Rows, encode, read_examples, split
from .training_report import Report, metrics_of, plot_curve

RUN = "run.json"  # what a run was started with, beside its checkpoints: --resume compares with it

METRICS = "metrics.json"

# A resumed run is the run that was interrupted only if these are what they were.
MUST_MATCH = ("adapter", "batch", "gradient_accumulation", "lr", "warmup", "dtype", "seed")


@dataclass
class Settings:
    """Everything that decides a run; the command line's options carry the same names.

    Args:
        model: directory or hub name of a causal language model.
        data: ``.jsonl`` and ``.txt`` files, see :func:`idlora_ext.tools.data.read_examples`.
        output: directory for checkpoints and results.
        held_out: fraction of the data to hold out, unless ``held_out_file`` is given.
        epochs, steps: how long to train; ``steps`` wins.
        batch: rows per step and device, times ``gradient_accumulation``.
        warmup: steps of linear warm-up, or below 1 the fraction of the run. The rate then falls along a cosine.
        dtype: of the frozen model: "auto" is the checkpoint's own.
        every: evaluate and write a checkpoint every so many steps; by default a tenth of the run.
        resume: go on from the last checkpoint in ``output``, or from the one named.
        overwrite: allow ``output`` to hold an earlier run, and replace it.
        adapter: fields of :class:`idlora_ext.IdLoraConfig`.
    """

    model: str
    data: Sequence[str]
    output: str
    text_field: str | None = None
    prompt_field: str | None = None
    completion_field: str | None = None
    chat: bool = False
    held_out: float = 0.1
    held_out_file: str | None = None
    packing: bool | None = None
    length: int = 512
    epochs: float = 3.0
    steps: int | None = None
    batch: int = 4
    gradient_accumulation: int = 1
    lr: float = 3e-4
    warmup: float = 0.1
    dtype: str = "auto"
    gradient_checkpointing: bool = False
    every: int | None = None
    resume: bool | str = False
    overwrite: bool = False
    seed: int = 0
    adapter: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("epochs", "steps", "batch", "gradient_accumulation", "lr", "every"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be greater than 0, got {value}")
        if self.warmup < 0:
            raise ValueError(f"warmup must not be negative, got {self.warmup}")


class Result(NamedTuple):
    """The adapted model, its tokenizer, and what ``metrics.json`` says."""

    model: Any
    tokenizer: Any
    metrics: dict[str, Any]


def finetune(settings: Settings) -> Result:
    """Fine-tune, evaluate before and after on held-out text, and write adapter, tokenizer, metrics and loss curve.

    Results appear in ``settings.output`` only when complete, ``metrics.json`` last.

    Raises:
        ValueError: settings or data that cannot work; said before anything expensive if it can be known then.
        OSError: model or files cannot be read or written.
    """
    output = Path(settings.output)
    checkpoint = _check_output(settings, output)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    train, held_out, notes = prepare(settings, tokenizer)
    print(*notes, sep="\n")
    run = json.loads(json.dumps(asdict(settings) | {"data": [str(path) for path in settings.data]}))
    run["data_digest"] = f"{train.digest()} {held_out.digest()}"
    if checkpoint:
        _check_same_run(checkpoint, run)

    set_seed(settings.seed)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=settings.dtype)
    arguments = _training_arguments(settings, model.dtype, rows=len(train), fresh=checkpoint is None)
    model.to(arguments.device)
    if checkpoint:  # rows and weights come from the file: nothing is clustered again
        lifecycle.load(model, checkpoint, is_trainable=True)
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*layers are too narrow")  # the summary says it, shorter
            lifecycle.apply(model, seed=settings.seed, **settings.adapter)
    summary = lifecycle.summary(model)
    ranks = ", ".join(str(r) for r in sorted({row.r for row in summary.rows}, reverse=True))
    trainable = f"{summary.trainable_parameters:,} trainable parameters ({summary.percent:.2f} %)"
    print(f"{trainable} in {len(summary.rows)} layers, r = {ranks}")

    output.mkdir(parents=True, exist_ok=True)
    if not checkpoint:
        for stale in output.glob("checkpoint-*"):  # of the run that --overwrite replaces
            shutil.rmtree(stale)
        _write_json(output / RUN, run)
    report = Report()
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        compute_metrics=_mean_loss,
        preprocess_logits_for_metrics=_token_losses,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(report)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        report.close()
    metrics = metrics_of(run, trainer, report, train, held_out)
    _publish(model, tokenizer, metrics, output)
    return Result(model, tokenizer, metrics)


def _check_output(settings: Settings, output: Path) -> Path | None:
    """Refuse to write over anything; return the checkpoint to resume from, if any."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("this runs in one process; for several, use transformers.Trainer with idlora_ext.apply")
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; the output must be a directory")
    if settings.resume:
        if settings.overwrite:
            raise ValueError("resuming and overwriting exclude each other")
        found = [Path(settings.resume)] if isinstance(settings.resume, str) else list(output.glob("checkpoint-*"))
        last = max(found, key=_global_step, default=output)
        if _global_step(last) < 0:
            raise ValueError(f"nothing to resume from: no complete checkpoint in {last if found else output}")
        return last
    if output.is_dir() and any(output.iterdir()) and not settings.overwrite:
        raise ValueError(f"{output} is not empty: take another directory, or resume or overwrite the run in it")
    return None


def _global_step(checkpoint: Path) -> int:
    """The step a checkpoint was written at, or -1 if it is incomplete: this file is the last to be written."""
    try:
        return int(json.loads((checkpoint / "trainer_state.json").read_text())["global_step"])
    except (OSError, ValueError, KeyError):
        return -1


def _check_same_run(checkpoint: Path, run: dict[str, Any]) -> None:
    path = checkpoint.parent / RUN
    if not path.is_file():
        raise ValueError(f"cannot resume from {checkpoint}: {path} is missing, so the settings cannot be compared")
    before = json.loads(path.read_text())
    for name in MUST_MATCH:
        if before.get(name) != run[name]:
            raise ValueError(f"cannot resume: {name} was {before.get(name)!r} and is now {run[name]!r}")
    if before.get("data_digest") != run["data_digest"]:
        raise ValueError("cannot resume: the data is not what it was, nor are its split and rows")


def _training_arguments(settings: Settings, dtype: torch.dtype, *, rows: int, fresh: bool) -> TrainingArguments:
    half = dtype is torch.float16
    if half and not torch.cuda.is_available():
        raise ValueError("training in float16 needs a CUDA device: ask for dtype bfloat16 or float32")
    total = settings.steps or math.ceil(settings.epochs * rows / settings.batch / settings.gradient_accumulation)
    every = settings.every or math.ceil(total / 10)
    # transformers before 5.23 has the old name alone, and later versions warn of it.
    known = hasattr(TrainingArguments, "activation_checkpointing")
    checkpointing = "activation_checkpointing" if known else "gradient_checkpointing"
    return TrainingArguments(
        output_dir=settings.output,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=settings.batch,
        gradient_accumulation_steps=settings.gradient_accumulation,
        num_train_epochs=settings.epochs,
        max_steps=settings.steps or -1,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup,
        fp16=half,  # small gradients need the loss scaler; bfloat16 does not, nor the float32 adapter itself
        **{
            checkpointing: settings.gradient_checkpointing,
            f"{checkpointing}_kwargs": {"use_reentrant": False},  # frozen embeddings: no input requires a gradient
        },
        eval_strategy="steps",
        eval_on_start=fresh,
        eval_steps=every,
        save_steps=every,
        save_total_limit=2,
        logging_steps=math.ceil(total / 100),
        logging_nan_inf_filter=False,  # a loss that is not a number must be seen
        include_num_input_tokens_seen="non_padding",
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=settings.seed,
        disable_tqdm=True,
        report_to="none",
    )


def _token_losses(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Loss and number of tokens of each row, so that the held-out loss is a mean over tokens, whatever the batches."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    labels = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return torch.stack([losses.view(labels.shape).sum(1), (labels != IGNORED).sum(1)], dim=1)


def _mean_loss(prediction: Any) -> dict[str, float]:
    loss, count = prediction.predictions.astype("float64").sum(axis=0)
    return {"loss": float(loss / count)}  # replaces the Trainer's own eval_loss, a mean over batches


def _publish(model: Any, tokenizer: Any, metrics: dict[str, Any], output: Path) -> None:
    """Write everything aside, then move it into place file by file, the metrics last."""
    with tempfile.TemporaryDirectory(dir=output, prefix=".unfinished-") as aside:
        lifecycle.save(model, aside)
        tokenizer.save_pretrained(aside)
        plot_curve(metrics["curve"], Path(aside, "loss.png"))
        for path in sorted(Path(aside).iterdir()):
            os.replace(path, output / path.name)
    _write_json(output / METRICS, metrics)


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(f".{path.name}.unfinished")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


def prepare(settings: Settings, tokenizer: Any) -> tuple[Rows, Rows, list[str]]:
    """Read, split and tokenise the data of a run: training rows, held-out rows, and what was done in words.

    Raises:
        ValueError: see :func:`read_examples`, :func:`split` and :func:`encode`; or less than one batch to train on.
    """
    names = ("text_field", "prompt_field", "completion_field")
    fields = {name: getattr(settings, name) for name in names}
    corpus = read_examples(settings.data, **fields)
    if settings.held_out_file:
        held_out_corpus = read_examples([settings.held_out_file], **fields)
        notes = [*corpus.notes, f"held out: {held_out_corpus.notes[0]}"]
    else:
        corpus, held_out_corpus = split(corpus, settings.held_out, settings.seed)
        notes = corpus.notes
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token will do
    tokenizer.padding_side = "right"
    train, held_out = (
        encode(part, tokenizer, length=settings.length, packing=settings.packing, chat=settings.chat)
        for part in (corpus, held_out_corpus)
    )
    if len(train) < settings.batch:
        raise ValueError(
            f"the training data makes {len(train)} rows of up to {settings.length} tokens, less than one batch of "
            f"{settings.batch}: give more data, or a smaller batch or length"
        )
    notes += [f"train: {note}" for note in train.notes] + [f"held out: {note}" for note in held_out.notes]
    return train, held_out, notes
