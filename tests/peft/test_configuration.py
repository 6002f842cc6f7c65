"""The configuration as PEFT and those who build on it use it: the object itself, and what they read of it."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model

import idlora_ext
from idlora_ext import IdLoraConfig
from tests.helpers.models import FIELDS, MODELS, inputs, layers_of, randomize_adapter, tiny_bert, tiny_llama


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
        assert not any(layer.idlora_adapter["default"].pending for layer in layers_of(bert).values())
    model.add_adapter("second", config)
    model.add_adapter("third", dataclasses.replace(config, r=4))
    for layer in layers_of(model).values():
        assert {*layer.idlora_adapter} == {"default", "second", "third"}
        assert not any(adapter.pending for adapter in layer.idlora_adapter.values())
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


@pytest.mark.parametrize("door", ["get_peft_model", "apply"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # an embedding of its own, one tied to the head
def test_trainable_tokens(kind, door, tmp_path):
    """PEFT trains them for any method whose configuration names them; TRL asks for it where it adds tokens."""
    ids = torch.tensor([[3, 5, 7, 3], [5, 5, 1, 2]])
    make = MODELS[kind].make
    config = IdLoraConfig(**FIELDS, trainable_token_indices=[3, 5] if kind == "llama" else {"wte": [3, 5]})

    def adapted():
        model = make()
        return get_peft_model(model, config) if door == "get_peft_model" else idlora_ext.apply(model, config)

    model = adapted()
    inner = model.get_base_model() if door == "get_peft_model" else model
    embedding, base = inner.get_input_embeddings(), make()
    (delta,) = (p for name, p in model.named_parameters() if "trainable_tokens" in name and p.requires_grad)
    before = delta.detach().clone()
    model.train()(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()
    assert not torch.equal(delta, before)
    expected = model.eval()(input_ids=ids).logits
    changed = (embedding(torch.arange(101)) != base.get_input_embeddings()(torch.arange(101))).any(-1)
    assert changed.nonzero().flatten().tolist() == [3, 5]

    if door == "get_peft_model":
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make(), tmp_path)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)
    else:
        idlora_ext.save(model, tmp_path)
        loaded = idlora_ext.load(make(), tmp_path)
    assert torch.equal(loaded.eval()(input_ids=ids).logits, expected)
    assert torch.equal(idlora_ext.load(adapted(), tmp_path).eval()(input_ids=ids).logits, expected)
    with idlora_ext.adapter_names(inner, ["__base__", "default"]):
        mixed = inner(input_ids=ids).logits
    torch.testing.assert_close(mixed[0], base(input_ids=ids).logits[0])
    torch.testing.assert_close(mixed[1], expected[1])
    assert torch.equal(idlora_ext.remove(model)(input_ids=ids).logits, base(input_ids=ids).logits)
    if door == "get_peft_model":
        assert torch.equal(loaded.unload()(input_ids=ids).logits, base(input_ids=ids).logits)


def test_trl_adds_the_tokens_of_a_chat_template(tmp_path):
    pytest.importorskip("trl", reason="SFTTrainer: pip install trl")
    from datasets import Dataset
    from tokenizers import AddedToken
    from trl import SFTConfig, SFTTrainer

    tokenizer, source = words(), words()
    source.add_tokens([AddedToken("<|turn|>", special=True)])
    source.chat_template = "{% for message in messages %}<|turn|>{{ message['content'] }}{% endfor %}"
    source.save_pretrained(tmp_path / "source")
    config = IdLoraConfig(**FIELDS)
    trainer = SFTTrainer(
        tiny_llama(),
        SFTConfig(
            output_dir=str(tmp_path), max_steps=2, chat_template_path=str(tmp_path / "source"), learning_rate=0.01,
            report_to=[], disable_tqdm=True, use_cpu=True, bf16=False, save_strategy="no",
        ),
        train_dataset=Dataset.from_list([{"input_ids": [*range(3, 15), 101]}] * 4),
        peft_config=config,
        processing_class=tokenizer,
    )  # fmt: skip
    assert config.trainable_token_indices["embed_tokens"][0] == 101
    assert config.modules_to_save == ["lm_head"]
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad and "idlora" not in name}
    assert any("trainable_tokens_delta.default" in name for name in trained)
    assert any("lm_head.modules_to_save.default" in name for name in trained)
    trainer.train()


def words():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    whole = Tokenizer(WordLevel({f"<{i}>": i for i in range(101)}, unk_token="<0>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=whole, unk_token="<0>", pad_token="<1>", eos_token="<2>"
    )


@pytest.mark.parametrize("compiled_before", [True, False])
def test_injecting_into_a_compiled_model_from_tensors(compiled_before):
    """PEFT takes the names of the layers from those of the tensors, without what torch.compile puts before them."""
    model = torch.compile(tiny_llama()) if compiled_before else tiny_llama()
    inject_adapter_in_model(IdLoraConfig(**FIELDS), model)
    tensors = get_peft_model_state_dict(model)
    other = inject_adapter_in_model(IdLoraConfig(**FIELDS), torch.compile(tiny_llama()), state_dict=tensors)
    assert len(layers_of(other)) == len(layers_of(model)) == 14
    names = {name.removeprefix("_orig_mod.") for name in get_peft_model_state_dict(other)}
    assert names == {name.removeprefix("_orig_mod.") for name in tensors}


def test_fields_that_are_loras_own_are_named_as_such():
    """Some libraries read them of any configuration, such as TRL for its vLLM workers."""
    ours = {field.name for field in dataclasses.fields(IdLoraConfig)}
    missing = {field.name for field in dataclasses.fields(LoraConfig)} - ours
    assert {"use_dora", "bias", "target_parameters", "lora_alpha"} <= missing
    for name in missing:
        with pytest.raises(AttributeError, match=f"IdLoraConfig has no {name}, which is LoRA's own"):
            getattr(IdLoraConfig(), name)
        assert getattr(IdLoraConfig(), name, None) is None
    with pytest.raises(AttributeError, match=r"IdLoraConfig has no nothing$"):
        _ = IdLoraConfig().nothing
