"""The tasks: real data, split without leakage, tokenised and packed once.

For language models every document is closed by the end-of-text token and documents are packed into rows of one length,
so that a step is the same work for every task; a document can see the ones before it in its row, in every method alike.
An encoder reads one document a row.
Which side of the split a document is on is a hash of what it is about, with its numbers taken out, so that neither
duplicates nor the same word problem with other numbers are on both.

Files: ``elementary_math_qa.jsonl.gz`` and ``sarcasm.jsonl.gz`` in the folder ``$IDLORA_COMPARE_DATA`` (by default
``../shared/data``); the novels come from the Debian package ``r-cran-janeaustenr``, through ``apt-get download``.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import struct
import subprocess
import tempfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from idlora_ext.tools.data import IGNORED

from . import ROOT

HELD_OUT = 10  # one document in so many
ROWS, HELD_OUT_ROWS = 4096, 48  # at most, of each task
MIXTURE_HELD_OUT_ROWS = 16  # of each part: as many in all
HEADLINES = "headlines"  # the task of encoders: those of `sarcasm`, to be classified
HEADLINE_ROWS, HELD_OUT_HEADLINES = 16384, 1024
VERSION = 2  # of what this file makes of the data


@dataclass(frozen=True)
class Document:
    """``learn_prompt``: the loss is over prompt and answer, otherwise over the answer alone."""

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    learn_prompt: bool = True


@dataclass
class Part:
    """Tokens of one task. ``train`` and ``held_out`` are ``[rows, 2, length]``: tokens, and labels. Of headlines the
    first label is the class and there are no others; behind them is padding.

    ``problems``: of each the tokens of the prompt, those of each choice, and which choice is right.
    """

    train: Tensor
    held_out: Tensor
    problems: list[tuple[list[int], list[list[int]], int]]
    digest: str


def elementary_math() -> Iterator[Document]:
    """Word problems with five choices (BIG-bench). Loss over problem and answer."""
    for record in _records("elementary_math_qa.jsonl.gz"):
        choices = tuple(f" {choice}" for choice in record["choices"])
        yield Document(f"{record['question']}\nAnswer:", f" {record['answer']}", choices)


def sarcasm() -> Iterator[Document]:
    """Headlines, sarcastic or not. Loss over the answer alone: one word and the end of the text."""
    for record in _records("sarcasm.jsonl.gz"):
        answer = {"1": " yes", "0": " no"}[str(record["label"])]
        yield Document(f"Headline: {record['text']}\nSarcastic:", answer, (" yes", " no"), learn_prompt=False)


def novels() -> Iterator[Document]:
    """Jane Austen's six novels, in passages of 40 lines. No metric but the loss."""
    for lines in _novels():
        for at in range(0, len(lines), 40):
            if passage := "\n".join(lines[at : at + 40]).strip():
                yield Document("", passage)


# Task: its parts, of each how many problems are asked.
SOURCES: dict[str, tuple[Callable[[], Iterator[Document]], int]] = {
    "math": (elementary_math, 40),
    "sarcasm": (sarcasm, 128),
    "novels": (novels, 0),
}
TASKS: dict[str, tuple[str, ...]] = {name: (name,) for name in (*SOURCES, HEADLINES)} | {"mixture": tuple(SOURCES)}


def load_task(task: str, model: Path, length: int) -> dict[str, Part]:
    """The parts of a task by name: those of a mixture have equally many rows."""
    parts = {name: _part(name, model, length) for name in TASKS[task]}
    if len(parts) > 1:
        rows = min(len(part.train) for part in parts.values())
        for name, part in parts.items():
            parts[name] = replace(part, train=part.train[:rows], held_out=part.held_out[:MIXTURE_HELD_OUT_ROWS])
    return parts


@cache
def task_digest(task: str, model: Path, length: int) -> str:
    """A hash of every token, label and problem."""
    digests = [part.digest for part in load_task(task, model, length).values()]
    return hashlib.sha256("".join([str(MIXTURE_HELD_OUT_ROWS), *digests]).encode()).hexdigest()[:16]


@cache
def _part(name: str, model: Path, length: int) -> Part:
    tokenizer_digest = hashlib.sha256((model / "tokenizer.json").read_bytes()).hexdigest()[:12]
    cache_folder = Path(os.environ.get("IDLORA_CACHE") or Path.home() / ".cache" / "idlora_ext") / "compare"
    file = cache_folder / f"{name}-{length}-{tokenizer_digest}-v{VERSION}.pt"
    if not file.is_file():
        cache_folder.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(f".{os.getpid()}")
        tokenise = _tokenise_headlines if name == HEADLINES else _tokenise
        torch.save(vars(tokenise(name, AutoTokenizer.from_pretrained(model), length)), aside)
        os.replace(aside, file)
    return Part(**torch.load(file, weights_only=True))


def _tokenise(name: str, tokenizer: Any, length: int) -> Part:
    if tokenizer.eos_token_id is None:
        raise ValueError("the model's tokenizer has no end-of-text token (eos_token), which closes every document")
    source, count = SOURCES[name]
    train, held_out = _split(source())
    problems = []
    for document in held_out:
        if len(problems) < count and document.choices.count(document.answer) == 1:
            prompt, *choices = (_ids(tokenizer, text) for text in (document.prompt, *document.choices))
            right = document.choices.index(document.answer)
            problems.append((prompt, choices, right))
    rows = [_pack(side, tokenizer, length, most) for side, most in ((train, ROWS), (held_out, HELD_OUT_ROWS))]
    if not all(len(side) for side in rows):
        raise ValueError(f"task {name}: too few documents for a row of {length} tokens on each side of the split")
    return Part(*rows, problems, _digest(rows, problems))


def _tokenise_headlines(_: str, tokenizer: Any, length: int) -> Part:
    records = (Document(record["text"], str(record["label"])) for record in _records("sarcasm.jsonl.gz"))
    rows = []
    for side, most in zip(_split(records), (HEADLINE_ROWS, HELD_OUT_HEADLINES), strict=True):
        texts = [document.prompt for document in side[:most]]
        ids = tokenizer(texts, truncation=True, max_length=length, padding="max_length", return_tensors="pt").input_ids
        labels = torch.full_like(ids, IGNORED)
        labels[:, 0] = torch.tensor([int(document.answer) for document in side[:most]])
        rows.append(torch.stack([ids, labels], dim=1))
    return Part(*rows, [], _digest(rows, []))


def _split(documents: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """To train on, and held out; each side in the order of a hash."""
    sides: tuple[list[tuple[bytes, Document]], ...] = ([], [])
    for document in documents:
        about = re.sub(r"\d+", "0", document.prompt or document.answer)
        held_out = hashlib.sha256(about.encode()).digest()[0] % HELD_OUT == 0
        order = hashlib.sha256(f"{document.prompt}{document.answer}".encode()).digest()
        sides[held_out].append((order, document))
    train, held_out = ([document for _, document in sorted(side, key=lambda one: one[0])] for side in sides)
    return train, held_out


def _digest(rows: list[Tensor], problems: list[Any]) -> str:
    sha = hashlib.sha256(json.dumps(problems).encode())
    for tensor in rows:
        sha.update(array("q", tensor.flatten().tolist()).tobytes())
    return sha.hexdigest()[:16]


def _pack(documents: list[Document], tokenizer: Any, length: int, most: int) -> Tensor:
    ids: list[int] = []
    labels: list[int] = []
    for document in documents:
        if len(ids) >= most * length:
            break
        prompt = _ids(tokenizer, document.prompt) if document.prompt else []
        answer = [*_ids(tokenizer, document.answer), tokenizer.eos_token_id]
        ids += prompt + answer
        labels += (prompt if document.learn_prompt else [IGNORED] * len(prompt)) + answer
    full = min(len(ids) // length, most) * length
    packed = [torch.tensor(side[:full]).view(-1, length) for side in (ids, labels)]
    return torch.stack(packed, dim=1)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _records(name: str) -> Iterator[dict[str, Any]]:
    folder = Path(os.environ.get("IDLORA_COMPARE_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / name).is_file():
        raise FileNotFoundError(
            f"{name} is not in {folder}: set IDLORA_COMPARE_DATA to the folder that holds it. It is made from "
            "BIG-bench (PyPI bigbench==1.0.0, elementary_math_qa/question_only: question, choices, answer) or from "
            "PyPI evals==3.0.1.post1 (registry/data/sarcasm/samples.jsonl: text, label), one JSON object a line"
        )
    with gzip.open(folder / name, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def _novels() -> Iterator[list[str]]:
    """Lines of each novel: vectors of strings in R's lazy-load database, an XDR serialisation under zlib."""
    with tempfile.TemporaryDirectory() as folder:
        for command in ("apt-get -qq download r-cran-janeaustenr", "dpkg-deb -x *.deb ."):
            run = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True)
            if run.returncode:
                raise OSError(f"the novels need a Debian system with package lists: {command}: {run.stderr.strip()}")
        data = next(Path(folder).rglob("data/Rdata.rdb")).read_bytes()
    while data:
        chunk = zlib.decompressobj()
        text, data = chunk.decompress(data[4:]), chunk.unused_data  # four bytes: the length
        (encoding,) = struct.unpack_from(">i", text, 14)  # after "X\n" and three version numbers
        at = 18 + encoding
        kind, count = struct.unpack_from(">ii", text, at)
        if kind & 255 != 16:
            raise OSError("r-cran-janeaustenr does not hold vectors of strings")
        at += 8
        lines = []
        for _ in range(count):
            _, size = struct.unpack_from(">ii", text, at)
            lines.append(text[at + 8 : at + 8 + size].decode("utf-8"))
            at += 8 + size
        yield lines
