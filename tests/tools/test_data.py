"""Reading, splitting, tokenising and packing of training data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast

from idlora_ext.tools.data import IGNORED, Corpus, Example, Rows, encode, encode_prompt, read_examples, split
from tests.helpers.text import byte_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def texts(*contents: str) -> Corpus:
    return Corpus([Example(content) for content in contents])


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"text": "a", "label": "1"}, Example("a")),
        ({"content": "a"}, Example("a")),
        ({"prompt": "p", "completion": "c"}, Example("c", "p")),
        ({"question": "p", "answer": "c", "choices": []}, Example("c", "p")),
        ({"instruction": "p", "output": "c", "input": "x"}, Example("c", "p")),
        ({"text": "a", "prompt": "half a pair"}, Example("a")),
    ],
)
def test_common_fields_are_found(tmp_path: Path, record: dict[str, str], expected: Example) -> None:
    assert read_examples([write_jsonl(tmp_path / "a.jsonl", record)]).examples == [expected]


def test_unused_fields_and_blank_records_are_mentioned(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "a", "label": 1}, {"text": " \n", "source": "x"})
    corpus = read_examples([path])
    assert corpus.examples == [Example("a")]
    assert corpus.notes == ["a.jsonl: 2 records, text in 'text', not used: label, source; 1 blank ones left out"]


def test_named_fields_win_over_common_ones(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "a", "prompt": "p", "completion": "c", "body": "b"})
    assert read_examples([path], text_field="body").examples == [Example("b")]
    assert read_examples([path], prompt_field="body", completion_field="text").examples == [Example("a", "b")]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"headline": "a", "body": "b"}], "neither a text nor .* Keys: body, headline"),
        ([{"text": "a", "prompt": "p", "completion": "c"}], "both a text .* and a prompt"),
        ([{"text": "a"}, {"prompt": "p"}], "in every record.* Keys: prompt, text"),
        ([{"text": "a"}, {"text": 5}], r"a.jsonl:2: field 'text' must be a string, got 5"),
        ([["text"]], r"a.jsonl:1: expected a JSON object, got list"),
        ([{"text": "  "}], "no text in .*a.jsonl"),
        ([], "no text in .*a.jsonl"),
    ],
)
def test_unusable_records(tmp_path: Path, records: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_examples([write_jsonl(tmp_path / "a.jsonl", *records)])


def test_missing_named_field_says_where_and_what_there_is(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"body": "a"}, {"title": "b"})
    with pytest.raises(ValueError, match=r"a\.jsonl:2: no field 'body'; found title"):
        read_examples([path], text_field="body")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2: not JSON"),
        ("a.txt", b"caf\xe9", r"a\.txt: not UTF-8 text .* at byte 3"),
        ("a.csv", b"text\na\n", r"expected a \.jsonl or a \.txt file, got '\.csv'"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_examples([tmp_path / name])


def test_unfitting_field_arguments(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "a"})
    with pytest.raises(ValueError, match="not both"):
        read_examples([path], text_field="a", prompt_field="b", completion_field="c")
    with pytest.raises(ValueError, match="belong together"):
        read_examples([path], prompt_field="b")


def test_text_and_prompts_do_not_mix(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain")
    pairs = write_jsonl(tmp_path / "b.jsonl", {"prompt": "p", "completion": "c"})
    with pytest.raises(ValueError, match="one kind at a time"):
        read_examples([tmp_path / "a.txt", pairs])


def test_unicode_byte_order_mark_and_empty_lines(tmp_path: Path) -> None:
    text = "naïve 日本語 🙂 line\u2028separator"
    path = tmp_path / "a.jsonl"
    line = json.dumps({"text": text}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + f"\r\n{line}\r\n\r\n{line}".encode())
    assert [example.text for example in read_examples([path]).examples] == [text, text]


# --- splitting -------------------------------------------------------------------------------------------------------


def test_split_is_random_complete_and_repeatable() -> None:
    corpus = texts(*(f"document {i}" for i in range(50)))
    train, held_out = split(corpus, 0.2, seed=1)
    assert len(held_out.examples) == 10
    assert sorted(train.examples + held_out.examples, key=corpus.examples.index) == corpus.examples
    assert held_out.examples != corpus.examples[40:]
    assert split(corpus, 0.2, seed=1)[1].examples == held_out.examples
    assert split(corpus, 0.2, seed=2)[1].examples != held_out.examples


def test_split_of_one_long_text_takes_its_last_lines() -> None:
    text = "".join(f"line {i}\n" for i in range(100))
    train, held_out = split(texts(text), 0.1, seed=0)
    (head,), (tail,) = train.examples, held_out.examples
    assert head.text + tail.text == text
    assert tail.text.startswith("\nline ")
    assert 0.08 < len(tail.text) / len(text) < 0.12


def test_split_that_leaves_nothing() -> None:
    pairs = Corpus([Example("c", "p")] * 5)
    with pytest.raises(ValueError, match=r"0\.1 of 5 examples is less than one"):
        split(pairs, 0.1, seed=0)
    with pytest.raises(ValueError, match="too little text"):
        split(texts("a"), 0.5, seed=0)
    for fraction in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match="between 0 and 1"):
            split(texts("some text"), fraction, seed=0)


# --- tokenising and packing ------------------------------------------------------------------------------------------


def test_packing_joins_documents_with_the_end_token_and_loses_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = ["abcde", "fg", "日本", "hijklmnop"]
    rows = encode(texts(*documents), tokenizer, length=8)
    stream = [token for row in rows.rows for token in row["input_ids"]]
    assert tokenizer.decode(stream) == "abcde</s>fg</s>日本</s>hijklmnop</s>"
    assert [len(row["input_ids"]) for row in rows.rows] == [8, 8, 8, 2]
    assert rows.notes == ["4 documents packed into 4 rows of 8 tokens, the last one padded (2 tokens)"]
    assert (rows.tokens, rows.targets) == (26, 22)


def test_padding_of_the_last_row_is_masked(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = encode(texts("abcdefghij"), tokenizer, length=8)
    batch = DataCollatorForSeq2Seq(tokenizer)(rows.rows)
    assert batch["input_ids"].shape == (2, 8)
    assert batch["attention_mask"][1].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert batch["labels"][1].tolist() == [*rows.rows[1]["input_ids"], *[IGNORED] * 5]


def test_a_last_row_of_one_token_is_dropped(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = encode(texts("abcdefgh"), tokenizer, length=8)
    assert [tokenizer.decode(row["input_ids"]) for row in rows.rows] == ["abcdefgh"]


def test_documents_begin_as_the_tokenizer_begins_them() -> None:
    tokenizer = byte_tokenizer(bos=True)
    rows = encode(texts("ab", "cd"), tokenizer, length=100)
    assert tokenizer.decode(rows.rows[0]["input_ids"]) == "<s>ab</s><s>cd</s>"


def test_without_packing_a_row_is_a_document(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = encode(texts("abcdefgh", "xy"), tokenizer, length=5, packing=False)
    assert [tokenizer.decode(row["input_ids"]) for row in rows.rows] == ["abcde", "xy</s>"]
    assert rows.notes == ["2 documents, one a row", "1 of them cut to 5 tokens, 4 tokens dropped"]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_only_the_completion_is_learnt(chat: bool, bos: bool) -> None:
    tokenizer = byte_tokenizer(bos=bos)
    (row,) = encode(Corpus([Example("12", "6+6=")]), tokenizer, length=100, chat=chat).rows
    begin = "<s>" if bos and not chat else ""
    prompt = "<user>6+6=</s><assistant>" if chat else begin + "6+6="
    assert tokenizer.decode(row["input_ids"]) == prompt + "12</s>"
    learnt = [label for label in row["labels"] if label != IGNORED]
    assert tokenizer.decode(learnt) == "12</s>"
    # Generation starts from exactly what training masked.
    assert row["input_ids"][: -len(learnt)] == encode_prompt("6+6=", tokenizer, chat=chat)


def test_long_examples_are_cut_or_left_out_and_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = Corpus([Example("c" * 10, "pp"), Example("c", "p" * 8), Example("c", "p")])
    rows = encode(corpus, tokenizer, length=8)
    assert [tokenizer.decode(row["input_ids"]) for row in rows.rows] == ["ppcccccc", "pc</s>"]
    assert rows.notes == [
        "2 examples, one a row, loss over the completions",
        "1 of them cut to 8 tokens, 5 tokens dropped",
        "1 examples left out: their prompt alone fills 8 tokens",
    ]


def test_a_template_that_rewrites_the_prompt_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% if add_generation_prompt %}Q{% else %}A{% endif %}{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match="does not keep the prompt unchanged"):
        encode(Corpus([Example("c", "p")]), tokenizer, length=8, chat=True)


def test_requests_that_make_no_sense(tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = Corpus([Example("c", "p")])
    with pytest.raises(ValueError, match="not packed"):
        encode(pairs, tokenizer, length=8, packing=True)
    with pytest.raises(ValueError, match="plain text"):
        encode(texts("a"), tokenizer, length=8, chat=True)
    with pytest.raises(ValueError, match="at least 2"):
        encode(texts("a"), tokenizer, length=1)
    with pytest.raises(ValueError, match="nothing to learn in 1 examples"):
        encode(Corpus([Example("c", "p" * 20)]), tokenizer, length=8)
    with pytest.raises(ValueError, match="prompt is empty"):
        encode_prompt("", tokenizer)
    bare = byte_tokenizer()
    bare.chat_template = bare.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        encode(texts("a"), bare, length=8)
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompt("a", bare, chat=True)


def test_digest_sees_every_token_label_and_row_boundary() -> None:
    rows = [{"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    reference = Rows(rows).digest()
    assert Rows([dict(row) for row in rows]).digest() == reference
    for other in (
        [{"input_ids": [1, 2, 5], "labels": [IGNORED, 2, 3]}, rows[1]],
        [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, rows[1]],
        [{"input_ids": [1, 2, 3, 4], "labels": [IGNORED, 2, 3, 4]}],
        rows[::-1],
    ):
        assert Rows(other).digest() != reference
