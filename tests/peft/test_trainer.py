"""Plain ``transformers.Trainer``: saving, resuming, best model, for apply and for get_peft_model."""

from __future__ import annotations

import os

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import idlora_ext
from idlora_ext import IdLoraConfig
from tests.helpers.models import FIELDS, MODELS, PLAIN, layers_of, logits, tiny_llama

DOORS = {
    "apply": lambda: idlora_ext.apply(tiny_llama(), dropout=0.1, **FIELDS),
    "get_peft_model": lambda: get_peft_model(tiny_llama(), IdLoraConfig(dropout=0.1, **FIELDS)),
}


def rows(count=32, length=12):
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(0, 101, (length,), generator=generator) for _ in range(count)]
    return [{"input_ids": t, "labels": t} for t in tokens]


def trainer(model, directory, steps, **options):
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=1,
        **options,
    )
    return Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows(8))


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("door", DOORS)
def test_resuming_gives_the_losses_of_an_uninterrupted_run(door, tmp_path):
    uninterrupted = trainer(DOORS[door](), tmp_path / "a", 8)
    uninterrupted.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    interrupted = trainer(DOORS[door](), tmp_path / "b", 8)
    interrupted.add_callback(Stop())
    interrupted.train()
    checkpoint = tmp_path / "b" / "checkpoint-4"
    assert (checkpoint / "adapter_model.safetensors").stat().st_size < 60_000  # the adapter, not the model
    assert not any(name.startswith("model") for name in os.listdir(checkpoint))

    resumed = trainer(DOORS[door](), tmp_path / "b", 8)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == losses(uninterrupted)
    for ours, theirs in zip(resumed.model.state_dict().items(), uninterrupted.model.state_dict().items(), strict=True):
        assert ours[0] == theirs[0]
        assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("door", DOORS)
def test_best_model_is_loaded_at_the_end(door, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True}
    options |= {"metric_for_best_model": "score", "greater_is_better": True}
    run = trainer(DOORS[door](), tmp_path, 12, **options)
    scores = iter([1, 3, 2])  # the second evaluation is the best
    run.compute_metrics = lambda _: {"score": next(scores)}
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-8")
    best = idlora_ext.load(tiny_llama(), tmp_path / "checkpoint-8")
    last = idlora_ext.load(tiny_llama(), tmp_path / "checkpoint-12")
    assert torch.equal(logits(run.model.eval()), logits(best))
    assert not torch.equal(logits(best), logits(last))
    assert all(layer.idlora_adapter["default"].B.requires_grad for layer in layers_of(run.model).values())


def test_a_defective_checkpoint_is_not_resumed_from(tmp_path):
    run = trainer(DOORS["apply"](), tmp_path, 4)
    run.train()
    weights = tmp_path / "checkpoint-4" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        trainer(DOORS["apply"](), tmp_path, 8).train(resume_from_checkpoint=True)


def test_trainers_of_other_models_are_left_alone(tmp_path):
    for model in (lambda: get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear")), tiny_llama):
        trainer(model(), tmp_path, 4).train()
        run = trainer(model(), tmp_path, 8)
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert run.state.global_step == 8


@pytest.mark.parametrize("kind", PLAIN)
def test_every_kind_of_model_learns_saves_and_reloads(kind, tmp_path):
    model = idlora_ext.apply(MODELS[kind].make(), **MODELS[kind].fields(exclude_modules=None))
    data = rows(4)  # few enough to be learned by heart
    if kind == "bert":
        data = [{"input_ids": row["input_ids"], "labels": i % 3} for i, row in enumerate(data)]
    run = trainer(model, tmp_path / "run", 16, lr_scheduler_type="constant")
    run.train_dataset = data
    run.train()
    assert sum(losses(run)[-3:]) < sum(losses(run)[:3])
    assert all(layer.idlora_adapter["default"].B.abs().sum() > 0 for layer in layers_of(model).values())
    model.save_pretrained(tmp_path / "adapter")
    reloaded = idlora_ext.load(MODELS[kind].make(), tmp_path / "adapter")
    assert torch.equal(logits(reloaded), logits(model.eval()))
    ids = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    if kind != "bert":
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(reloaded.generate(**ids, **options), model.generate(**ids, **options))
