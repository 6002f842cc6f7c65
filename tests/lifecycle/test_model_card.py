"""The README.md beside an adapter: what it says is true, and what somebody wrote stays."""

from __future__ import annotations

import re

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM

import idlora_ext
from tests.helpers.models import FIELDS, inputs, logits, randomize_static, tiny_llama


@pytest.fixture
def saved(tmp_path):
    """A base model on disk, and its adapter's and LoRA's directories."""
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    model = type(tiny_llama()).from_pretrained(base)
    randomize_static(idlora_ext.apply(model, **FIELDS | {"router": "static"}))
    idlora_ext.save(model, tmp_path / "adapter")
    idlora_ext.to_lora(model, tmp_path / "lora")
    return tmp_path, logits(model)


@pytest.mark.parametrize("kind", ["adapter", "lora"])
def test_the_lines_of_the_card_load_the_model(kind, saved, monkeypatch):
    directory, expected = saved
    card = ModelCard.load(directory / kind / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model is None  # a directory of somebody's, which the hub would refuse
    assert ("import idlora_ext" in card.content) == (kind == "adapter")
    (code,) = re.findall(r"```python\n(.*?)```", card.content, re.DOTALL)
    found = {}
    monkeypatch.chdir(directory)  # where "base" is the base model's name
    exec(code.replace("path/to/this/directory", kind), found)
    with torch.no_grad():
        torch.testing.assert_close(found["model"].eval()(input_ids=inputs()["input_ids"]).logits, expected)


def test_a_base_on_the_hub_is_named(tmp_path):
    model = tiny_llama()
    model.name_or_path = model.config._name_or_path = "someone/tiny-llama"
    idlora_ext.save(idlora_ext.apply(model, **FIELDS), tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "someone/tiny-llama"


def test_a_card_of_somebody_stays(saved):
    directory, _ = saved
    (directory / "adapter" / "README.md").write_text("mine")
    model = AutoPeftModelForCausalLM.from_pretrained(directory / "adapter")
    idlora_ext.save(model, directory / "adapter")
    assert (directory / "adapter" / "README.md").read_text() == "mine"
