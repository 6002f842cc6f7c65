"""Files in, rows of tokens out: reading, splitting, tokenising and packing what a model is fine-tuned on."""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

TEXT_FIELDS = ("text", "content", "document")

PROMPT_FIELDS = ("prompt", "question", "instruction", "query")

COMPLETION_FIELDS = ("completion", "answer", "response", "output")

IGNORED = -100  # label of a token that is read but not learnt, as everywhere in transformers


@dataclass(frozen=True)
class Example:
    """One document. The loss is taken over ``text``; ``prompt`` (None for plain text) is only read."""

    text: str
    prompt: str | None = None


@dataclass
class Corpus:
    """What was read: the examples, and in words what was found and what was left out."""

    examples: list[Example]
    notes: list[str] = field(default_factory=list)

    @property
    def has_prompts(self) -> bool:
        """Whether these are prompts with completions rather than plain text."""
        return any(example.prompt is not None for example in self.examples)


@dataclass
class Rows:
    """Rows of tokens (``input_ids`` and ``labels``), ready for a padding collator, and notes on what was cut."""

    rows: list[dict[str, list[int]]]
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        return self.rows[i]

    @property
    def tokens(self) -> int:
        """Tokens in all rows."""
        return sum(len(row["input_ids"]) for row in self.rows)

    @property
    def targets(self) -> int:
        """Tokens the loss is taken over: the first token of a row is predicted from nothing, so it never counts."""
        return sum(label != IGNORED for row in self.rows for label in row["labels"][1:])

    def digest(self) -> str:
        """A hash of every token and label: the same rows or not."""
        sha = hashlib.sha256()
        for row in self.rows:
            for key in ("input_ids", "labels"):
                sha.update(array("q", [len(row[key]), *row[key]]).tobytes())
        return sha.hexdigest()


def read_examples(
    paths: Sequence[str | Path],
    *,
    text_field: str | None = None,
    prompt_field: str | None = None,
    completion_field: str | None = None,
) -> Corpus:
    """Read ``.jsonl`` files (one JSON object a line) and ``.txt`` files (one document each).

    Args:
        paths: the files. Either all hold plain text or all hold prompts with completions.
        text_field, prompt_field, completion_field: which keys to read; by default the common names are looked for.

    Returns:
        The examples in file order. Blank ones are left out, and the notes say how many.

    Raises:
        ValueError: an unknown kind of file, a line that is not a JSON object, fields that cannot be found or are not
            strings, nothing left. The message names the file, the line and the keys that were found.
        OSError: a file cannot be read.
    """
    if text_field and (prompt_field or completion_field):
        raise ValueError("give either a text field or a prompt and a completion field, not both")
    if bool(prompt_field) != bool(completion_field):
        raise ValueError("a prompt field and a completion field belong together: give both")
    keys = tuple(key for key in (text_field, prompt_field, completion_field) if key)
    corpus = Corpus([])
    for path in map(Path, paths):
        if path.suffix == ".txt":
            examples, kind = [Example(_read(path))], "one document"
        elif path.suffix == ".jsonl":
            examples, kind = _read_jsonl(path, keys)
        else:
            raise ValueError(f"{path}: expected a .jsonl or a .txt file, got {path.suffix or 'no suffix'!r}")
        kept = [example for example in examples if example.text.strip()]
        blank = len(examples) - len(kept)
        corpus.notes.append(f"{path.name}: {kind}" + (f"; {blank} blank ones left out" if blank else ""))
        corpus.examples += kept
    if not corpus.examples:
        raise ValueError("no text in " + ", ".join(str(path) for path in paths))
    if corpus.has_prompts and any(example.prompt is None for example in corpus.examples):
        raise ValueError("some files hold plain text and some prompts with completions: train on one kind at a time")
    return corpus


def split(corpus: Corpus, fraction: float, seed: int) -> tuple[Corpus, Corpus]:
    """Hold out a random ``fraction`` of the examples, or, of few long texts, the last part of each.

    Returns:
        The training part and the held-out part, both in the original order.

    Raises:
        ValueError: ``fraction`` is not in (0, 1), or one of the parts would be empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the held-out fraction must be between 0 and 1, got {fraction}")
    examples = corpus.examples
    count = int(len(examples) * fraction)
    if count:
        chosen = set(random.Random(seed).sample(range(len(examples)), count))
        parts = [[e for i, e in enumerate(examples) if (i in chosen) == held_out] for held_out in (False, True)]
        note = f"held out: {count} of {len(examples)} examples, at random"
    elif corpus.has_prompts:
        raise ValueError(
            f"{fraction:g} of {len(examples)} examples is less than one: hold out more, or give a held-out file"
        )
    else:
        cuts = [(example.text, _cut(example.text, fraction)) for example in examples]
        parts = [[Example(text[:cut]) for text, cut in cuts], [Example(text[cut:]) for text, cut in cuts]]
        parts = [[example for example in part if example.text.strip()] for part in parts]
        note = f"held out: the last {fraction:.0%} of each text"
    if not all(parts):
        raise ValueError(f"too little text to hold out {fraction:g} of it: give a held-out file")
    return Corpus(parts[0], [*corpus.notes, note]), Corpus(parts[1])


def encode(corpus: Corpus, tokenizer: Any, *, length: int, packing: bool | None = None, chat: bool = False) -> Rows:
    """Turn examples into rows of at most ``length`` tokens.

    Plain text is packed: the documents, each closed by the end-of-text token, form one stream that is cut into rows.
    Only the last row is shorter; the collator pads it and masks the padding, so no token is lost. Unpacked, a row is
    one document. Prompts with completions are never packed, since one example would read another: a row is one
    example, and the labels of the prompt are masked.

    Args:
        packing: by default, whatever suits the data.
        chat: wrap prompt and completion in the tokenizer's chat template.

    Raises:
        ValueError: ``length`` < 2, a tokenizer without an end-of-text token or chat template where one is needed,
            packing asked for where it would be wrong, or no row with anything to learn.
    """
    if length < 2:
        raise ValueError(f"the length of a row must be at least 2 tokens, got {length}")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token (eos_token), so documents could not be told apart")
    if corpus.has_prompts:
        if packing:
            raise ValueError("prompts with completions are not packed, since one example would read another")
        rows = _encode_pairs(corpus.examples, tokenizer, length, chat)
    elif chat:
        raise ValueError("the chat template needs prompts with completions, and this is plain text")
    else:
        rows = _encode_texts(corpus.examples, tokenizer, length, packed=packing is not False)
    if not rows.targets:
        raise ValueError(f"nothing to learn in {len(corpus.examples)} examples at a length of {length} tokens")
    return rows


def encode_prompt(prompt: str, tokenizer: Any, *, chat: bool = False) -> list[int]:
    """The tokens a completion of ``prompt`` starts from: the same ones in training and in generation.

    Raises:
        ValueError: no chat template where one is needed, or nothing to start from.
    """
    if chat:
        ids = _apply_template(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
    else:
        ids = list(tokenizer(prompt, verbose=False).input_ids)
        if ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers close what they are given
            ids.pop()
    if not ids:
        raise ValueError("the prompt is empty")
    return ids


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def _read_jsonl(path: Path, keys: tuple[str, ...]) -> tuple[list[Example], str]:
    """``keys``: that of the text, or those of prompt and completion, or none, and they are looked for."""
    records = []
    for number, line in enumerate(_read(path).split("\n"), start=1):  # not splitlines: JSON strings may hold U+2028
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, got {type(record).__name__}")
        records.append((f"{path}:{number}", record))
    if not records:
        return [], "no lines"
    keys = keys or _detect_fields(path, [record for _, record in records])
    examples = []
    for where, record in records:
        *prompt, text = (_string(record, key, where) for key in keys)
        examples.append(Example(text, *prompt))
    unused = sorted({key for _, record in records for key in record} - set(keys))
    kind = "text in {!r}" if len(keys) == 1 else "prompt in {!r}, completion in {!r}"
    kind = f"{len(examples)} records, {kind.format(*keys)}"
    return examples, kind + (f", not used: {', '.join(unused)}" if unused else "")


def _detect_fields(path: Path, records: list[dict[str, Any]]) -> tuple[str, ...]:
    everywhere = set.intersection(*(set(record) for record in records))
    text, prompt, completion = (
        next((name for name in names if name in everywhere), None)
        for names in (TEXT_FIELDS, PROMPT_FIELDS, COMPLETION_FIELDS)
    )
    if text and not (prompt and completion):
        return (text,)
    if prompt and completion and not text:
        return prompt, completion
    found = ", ".join(sorted({key for record in records for key in record})) or "none"
    if text:
        problem = f"found both a text ({text!r}) and a prompt with a completion ({prompt!r}, {completion!r})"
    else:
        problem = "found neither a text nor a prompt with a completion under a common name in every record"
    raise ValueError(
        f"{path}: {problem}; name the fields (--text-field, or --prompt-field with --completion-field). Keys: {found}"
    )


def _string(record: dict[str, Any], key: str, where: str) -> str:
    if key not in record:
        raise ValueError(f"{where}: no field {key!r}; found {', '.join(record) or 'none'}")
    if not isinstance(record[key], str):
        raise ValueError(f"{where}: field {key!r} must be a string, got {record[key]!r:.40}")
    return record[key]


def _cut(text: str, fraction: float) -> int:
    """Where the last ``fraction`` of a text begins: at the start of a line or a word if there is one."""
    cut = int(len(text) * (1 - fraction))
    return max(text.rfind("\n", 0, cut), 0) or max(text.rfind(" ", 0, cut), 0) or cut


def _encode_texts(examples: Sequence[Example], tokenizer: Any, length: int, packed: bool) -> Rows:
    documents = []
    for ids in tokenizer([example.text for example in examples], verbose=False).input_ids:
        documents.append(ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id])
    if packed:
        stream = list(chain.from_iterable(documents))
        rows = [stream[start : start + length] for start in range(0, len(stream), length)]
        notes = [f"{len(documents)} documents packed into {len(rows)} rows of {length} tokens"]
        if len(rows[-1]) < length:
            notes[0] += f", the last one padded ({len(rows[-1])} tokens)"
        if len(rows[-1]) < 2:
            rows.pop()  # one token has nothing to predict it from
    else:
        rows = [ids[:length] for ids in documents]
        notes = [f"{len(rows)} documents, one a row", *_cut_note(documents, rows, length)]
    return Rows([{"input_ids": row, "labels": row} for row in rows], notes)


def _encode_pairs(examples: Sequence[Example], tokenizer: Any, length: int, chat: bool) -> Rows:
    whole, rows, unanswered = [], [], 0
    for example in examples:
        prompt = example.prompt or ""
        start = encode_prompt(prompt, tokenizer, chat=chat) if prompt or chat else []
        if chat:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": example.text}]
            ids = _apply_template(tokenizer, turns)
            if ids[: len(start)] != start:
                raise ValueError(
                    "this tokenizer's chat template does not keep the prompt unchanged when the answer is added; "
                    "train without it"
                )
        else:
            ids = start + list(tokenizer(example.text, add_special_tokens=False, verbose=False).input_ids)
            ids.append(tokenizer.eos_token_id)
        if len(start) >= length:
            unanswered += 1
            continue
        whole.append(ids)
        rows.append({"input_ids": ids[:length], "labels": [IGNORED] * len(start) + ids[len(start) : length]})
    notes = [f"{len(rows)} examples, one a row, loss over the completions"]
    notes += _cut_note(whole, [row["input_ids"] for row in rows], length)
    if unanswered:
        notes.append(f"{unanswered} examples left out: their prompt alone fills {length} tokens")
    return Rows(rows, notes)


def _cut_note(whole: Sequence[Sequence[int]], rows: Sequence[Sequence[int]], length: int) -> list[str]:
    cut = [len(ids) - len(row) for ids, row in zip(whole, rows, strict=True) if len(row) < len(ids)]
    return [f"{len(cut)} of them cut to {length} tokens, {sum(cut)} tokens dropped"] if cut else []


def _apply_template(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template")
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options))
