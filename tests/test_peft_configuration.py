"""The configuration as PEFT and those who build on it use it: the object itself, and what they read of it."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import transformers
from conftest import FIELDS, inputs, layers_of, randomize_adapter, tiny_bert, tiny_llama
from peft import PeftModel, get_peft_model

import idlora_ext
from idlora_ext import IdLoraConfig


def test_the_users_configuration_is_the_models_and_serves_again(tmp_path):
    """PEFT's task models change the object they are given, and expect to find the change in the tuner."""
    config = IdLoraConfig(**FIELDS, exclude_modules=["classifier"])
    asked = copy.deepcopy(config)
    model = get_peft_model(tiny_llama(), config)
    assert model.peft_config["default"] is config
    assert "all-linear" not in config.target_modules  # but what it was resolved to, as for LoRA
    model.save_pretrained(tmp_path)
    assert IdLoraConfig.from_pretrained(tmp_path).index_stored
    assert not config.index_stored

    for other in (config, copy.deepcopy(config)):
        bert = get_peft_model(tiny_bert(), other)  # "all-linear" of another model
        assert len(layers_of(bert)) == 13
        assert not any(layer.pending for layer in layers_of(bert).values())
    model.add_adapter("second", config)
    model.add_adapter("third", dataclasses.replace(config, r=4))
    for layer in layers_of(model).values():
        assert {*layer.idlora_B} == {"default", "second", "third"}
        assert not layer.pending
    resolved = copy.deepcopy(config)
    idlora_ext.apply(tiny_bert(), config)
    assert config == resolved  # apply copies
    config.target_modules = {"q_proj"}  # said anew
    assert len(layers_of(get_peft_model(tiny_llama(), config))) == 2

    with pytest.raises(ValueError, match="too narrow"):
        get_peft_model(tiny_llama(), failing := dataclasses.replace(asked, r=64, rank_fit="error"))
    assert failing.target_modules == "all-linear"


@pytest.mark.parametrize(("task", "head"), [("TokenClassification", "classifier"), ("QuestionAnswering", "qa_outputs")])
def test_task_models_train_their_head_in_full(task, head, tmp_path):
    """PEFT says that the head is to be trained only once the adapter is in: "all-linear" must leave it out."""

    def bert():
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        return getattr(transformers, f"BertFor{task}")(transformers.BertConfig(vocab_size=101, **sizes)).eval()

    config = IdLoraConfig(**FIELDS, task_type="TOKEN_CLS" if head == "classifier" else "QUESTION_ANS")
    model = randomize_adapter(get_peft_model(bert(), config).eval())
    model.add_adapter("second", dataclasses.replace(config, modules_to_save=None, target_modules="all-linear"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "idlora" not in name}
    assert trained == {f"base_model.model.{head}.modules_to_save.default.{kind}" for kind in ("weight", "bias")}
    assert len(layers_of(model)) == 12
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert(), tmp_path).eval()
    assert torch.equal(loaded(**inputs())[0], model(**inputs())[0])
