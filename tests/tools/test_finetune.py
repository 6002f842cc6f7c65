"""``idlora finetune``, run for real on a tiny random model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

import idlora_ext
from idlora_ext.cli import main
from tests.helpers.commands import ADAPTER, PNG, error_of
from tests.helpers.text import write_jsonl

RESULTS = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "metrics.json", "loss.png"}


def metrics_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "metrics.json").read_text())


def test_finetune_learns_and_writes_everything(run_path: Path) -> None:
    assert {path.name for path in run_path.iterdir()} >= RESULTS
    assert not [path for path in run_path.iterdir() if "unfinished" in path.name]
    metrics = metrics_of(run_path)
    assert metrics["held_out_loss"]["after"] < metrics["held_out_loss"]["before"] - 0.1
    assert [point["step"] for point in metrics["curve"] if "held_out" in point] == [0, 4, 8, 12]
    assert len([point for point in metrics["curve"] if "train" in point]) == 12
    assert metrics["settings"]["adapter"]["r"] == 8
    assert metrics["data"]["train"]["rows"] == 18
    assert metrics["trainable_parameters"] == sum(
        tensor.numel()
        for key, tensor in load_file(run_path / "adapter_model.safetensors").items()
        if key.endswith(".B") or key.endswith(".router")
    )
    assert metrics["tokens_per_second"] > 0
    assert (run_path / "loss.png").read_bytes().startswith(PNG)


def held_out_loss(model: Any, tokenizer: Any) -> float:
    """Loss per token of the two examples that were held out, by plain arithmetic, one example at a time."""
    total, count = 0.0, 0
    for prompt, completion in HELD_OUT:
        start = tokenizer(prompt).input_ids
        ids = torch.tensor([[*start, *tokenizer(completion).input_ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        targets = ids[0, 1:]
        losses = -logprobs[torch.arange(len(targets)), targets][len(start) - 1 :]
        total, count = total + float(losses.sum()), count + len(losses)
    return total / count


HELD_OUT = [("a long prompt, longer than the other:", " yes"), ("b", " a longer completion than the other")]


@pytest.fixture(scope="module")
def held_out_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "held_out.jsonl"
    return str(write_jsonl(path, *({"prompt": p, "completion": c} for p, c in HELD_OUT)))


@pytest.mark.parametrize("door", ["peft", "transformers", "idlora_ext"])
def test_reported_losses_are_those_of_the_saved_adapter(
    model_path: str, pairs_path: str, held_out_file: str, tmp_path: Path, door: str
) -> None:
    output = tmp_path / "run"
    argv = [
        "finetune",
        model_path,
        pairs_path,
        "--held-out-file",
        held_out_file,
        "--output",
        str(output),
        "--steps",
        "3",
    ]
    assert main([*argv, "--lr", "1e-2", "--batch", "1", *ADAPTER]) == 0
    reported = metrics_of(output)["held_out_loss"]

    tokenizer = AutoTokenizer.from_pretrained(output)
    loaded = AutoModelForCausalLM.from_pretrained(model_path)
    assert held_out_loss(loaded, tokenizer) == pytest.approx(reported["before"], rel=1e-5)
    if door == "peft":
        loaded = PeftModel.from_pretrained(loaded, output)
    elif door == "transformers":
        loaded.load_adapter(str(output))
    else:
        idlora_ext.load(loaded, output)
    assert held_out_loss(loaded, tokenizer) == pytest.approx(reported["after"], rel=1e-5)


class Stopped(BaseException):
    """Ends a run at a certain step, as Ctrl-C does."""


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int, error: type[BaseException]) -> None:
    original: Callable[..., Any] = Trainer.training_step
    calls = iter(range(10**6))

    def training_step(*args: Any, **kwargs: Any) -> Any:
        if next(calls) >= steps:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)


@pytest.mark.parametrize("data", ["pairs_path", "text_path"])
def test_a_resumed_run_is_the_uninterrupted_run(
    model_path: str, data: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    path = request.getfixturevalue(data)
    options = ["--epochs", "2", "--every", "3", "--length", "64", "--lr", "1e-2", "--dropout", "0.2", *ADAPTER]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["finetune", model_path, path, "--output", str(whole), *options]) == 0
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_after(monkeypatch, 7, KeyboardInterrupt)
        assert main(["finetune", model_path, path, "--output", str(parts), *options]) == 130
    assert capsys.readouterr().err.endswith(
        "idlora: interrupted; the same command with --resume goes on from the last checkpoint\n"
    )
    assert not RESULTS & {path.name for path in parts.iterdir()}
    assert main(["finetune", model_path, path, "--output", str(parts), *options, "--resume"]) == 0

    expected, found = (load_file(output / "adapter_model.safetensors") for output in (whole, parts))
    assert expected.keys() == found.keys()
    for key in expected:
        assert torch.equal(expected[key], found[key]), key
    assert metrics_of(whole)["curve"] == metrics_of(parts)["curve"]


def test_resume_refuses_another_run(
    run_path: Path, model_path: str, pairs_path: str, text_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--every", "4", "--lr", "2e-2", "--dropout", "0.1", *ADAPTER]
    again = ["finetune", model_path, pairs_path, "--output", str(run_path), "--resume", *options]
    assert "already at step 12 of 12" in error_of(capsys, *again, "--steps", "12")
    assert "lr was 0.02 and is now 0.1" in error_of(capsys, *again, "--steps", "20", "--lr", "0.1")
    assert "adapter was" in error_of(capsys, *again, "--steps", "20", "--r", "4")
    other = ["finetune", model_path, text_path, "--output", str(run_path), "--resume", *options]
    assert "the data is not what it was" in error_of(capsys, *other, "--steps", "20")
    nothing = ["finetune", model_path, pairs_path, "--output", str(tmp_path / "none"), "--resume", *ADAPTER]
    assert "no complete checkpoint" in error_of(capsys, *nothing)


def test_an_unfinished_checkpoint_is_passed_over(
    run_path: Path, model_path: str, pairs_path: str, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(run_path, output)
    (output / "checkpoint-12" / "trainer_state.json").unlink()
    options = ["--every", "4", "--lr", "2e-2", "--dropout", "0.1", "--steps", "12", *ADAPTER]
    assert main(["finetune", model_path, pairs_path, "--output", str(output), "--resume", *options]) == 0
    expected, found = (load_file(path / "adapter_model.safetensors") for path in (run_path, output))
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_output_is_never_overwritten_unasked(
    model_path: str, pairs_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint-99").mkdir()
    argv = ["finetune", model_path, pairs_path, "--output", str(tmp_path), "--steps", "1", *ADAPTER]
    assert "is not empty" in error_of(capsys, *argv)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "checkpoint-99"}
    assert main([*argv, "--overwrite"]) == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "checkpoint-99").exists()
    assert (tmp_path / "metrics.json").is_file()


def test_a_failed_run_leaves_the_earlier_results(
    run_path: Path, model_path: str, pairs_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    shutil.copytree(run_path, output)
    before = {name: (output / name).read_bytes() for name in RESULTS}
    stop_after(monkeypatch, 1, Stopped)
    with pytest.raises(Stopped):
        main(["finetune", model_path, pairs_path, "--output", str(output), "--overwrite", "--steps", "3", *ADAPTER])
    assert {name: (output / name).read_bytes() for name in RESULTS} == before


def test_finetune_options_reach_the_run(model_path: str, text_path: str, tmp_path: Path) -> None:
    options = (
        "--chat --length 48 --batch 2 --gradient-accumulation 2 --steps 2 --gradient-checkpointing --seed 3 --warmup 1"
    )
    fields = "--rank-boost 1 --scaling 0.5 --selection pivoted_qr --router linear --row-scale --no-shared-router --target-modules q_proj,down_proj"
    argv = ["finetune", model_path, text_path, "--output", str(tmp_path / "run"), "--dtype", "bfloat16"]
    assert main([*argv, *options.split()[1:], *fields.split(), *ADAPTER]) == 0
    tensors = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert {key.split(".")[-3] for key in tensors} == {"q_proj", "down_proj"}
    assert {tuple(tensor.shape) for key, tensor in tensors.items() if key.endswith("router")} == {(2, 8)}
    assert {tuple(tensor.shape) for key, tensor in tensors.items() if key.endswith(".B")} == {(64, 8)}
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (config["scaling"], config["selection"], config["seed"]) == (0.5, "pivoted_qr", 3)
    assert (config["router"], config["row_scale"], config["shared_router"]) == ("linear", True, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "100"], "makes 18 rows of up to 512 tokens, less than one batch of 100"),
        (["--held-out", "0.01"], "0.01 of 20 examples is less than one"),
        (["--held-out", "1.5"], "between 0 and 1"),
        (["--packing"], "not packed"),
        (["--text-field", "body"], "no field 'body'; found prompt, completion"),
        (["--steps", "0"], "steps must be greater than 0"),
        (["--dtype", "int4"], "invalid choice: 'int4'"),
        (["--r", "7"], "r must be a multiple of rank_boost"),
        (["--selection", "best"], "selection must be one of"),
        (["--preset", "paper", "--router", "static"], "preset='paper' means router='linear', got 'static'"),
        (["--target-modules", "no_such_layer"], "no_such_layer"),
        (["--resume", "--overwrite"], "exclude each other"),
        (["--dtype", "float16"], "needs a CUDA device"),
    ],
)
def test_finetune_errors(
    model_path: str,
    pairs_path: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert message in error_of(
        capsys, "finetune", model_path, pairs_path, "--output", str(tmp_path / "run"), *ADAPTER, *options
    )
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(
    model_path: str, pairs_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "finetune",
        model_path,
        pairs_path,
        "--output",
        str(tmp_path),
        "--steps",
        "6",
        "--warmup",
        "0",
        "--lr",
        "1e30",
    ]
    assert "try a lower learning rate" in error_of(capsys, *argv, *ADAPTER)
    assert not (tmp_path / "metrics.json").exists()
