"""Every command, run for real on a tiny random model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from peft import PeftModel
from safetensors.torch import load_file
from test_data import byte_tokenizer, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

import idlora_ext
from idlora_ext.cli import ADAPTER_OPTIONS, build_parser, main
from idlora_ext.finetune import Settings
from idlora_ext.inspection import compare
from idlora_ext.layer import IdLoraLayer

ADAPTER = ["--r", "8", "--num-clusters", "2"]
RESULTS = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "metrics.json", "loss.png"}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a model and a tokenizer of one token a byte."""
    directory = tmp_path_factory.mktemp("model")
    tiny_llama(vocab_size=260, bos_token_id=1, eos_token_id=0, pad_token_id=0).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prompts of several lengths, all with the same answer: soon learnt."""
    records = [{"prompt": f"{10**i} times 0 is", "completion": " nothing"} for i in range(20)]
    return str(write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", *records))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"{i} and {i} make {2 * i}.\n" for i in range(150)))
    return str(path)


@pytest.fixture(scope="module")
def run(model: str, pairs: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a short fine-tuning."""
    output = tmp_path_factory.mktemp("runs") / "run"
    options = ["--steps", "12", "--every", "4", "--lr", "2e-2", "--dropout", "0.1"]
    assert main(["finetune", model, pairs, "--output", str(output), *options, *ADAPTER]) == 0
    return output


def metrics_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "metrics.json").read_text())


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that must fail, and return its message."""
    capsys.readouterr()
    try:
        code = main(argv)
    except SystemExit as end:  # argparse's own
        code = end.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.startswith("idlora: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


# --- finetune --------------------------------------------------------------------------------------------------------


def test_finetune_learns_and_writes_everything(run: Path) -> None:
    assert {path.name for path in run.iterdir()} >= RESULTS
    assert not [path for path in run.iterdir() if "unfinished" in path.name]
    metrics = metrics_of(run)
    assert metrics["held_out_loss"]["after"] < metrics["held_out_loss"]["before"] - 0.1
    assert [point["step"] for point in metrics["curve"] if "held_out" in point] == [0, 4, 8, 12]
    assert len([point for point in metrics["curve"] if "train" in point]) == 12
    assert metrics["settings"]["adapter"]["r"] == 8
    assert metrics["data"]["train"]["rows"] == 18
    assert metrics["trainable_parameters"] == sum(
        tensor.numel()
        for key, tensor in load_file(run / "adapter_model.safetensors").items()
        if "_B" in key or "_r" in key
    )
    assert metrics["tokens_per_second"] > 0
    assert (run / "loss.png").read_bytes().startswith(PNG)


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
    model: str, pairs: str, held_out_file: str, tmp_path: Path, door: str
) -> None:
    output = tmp_path / "run"
    argv = ["finetune", model, pairs, "--held-out-file", held_out_file, "--output", str(output), "--steps", "3"]
    assert main([*argv, "--lr", "1e-2", "--batch", "1", *ADAPTER]) == 0
    reported = metrics_of(output)["held_out_loss"]

    tokenizer = AutoTokenizer.from_pretrained(output)
    loaded = AutoModelForCausalLM.from_pretrained(model)
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


@pytest.mark.parametrize("data", ["pairs", "text"])
def test_a_resumed_run_is_the_uninterrupted_run(
    model: str, data: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    path = request.getfixturevalue(data)
    options = ["--epochs", "2", "--every", "3", "--length", "64", "--lr", "1e-2", "--dropout", "0.2", *ADAPTER]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["finetune", model, path, "--output", str(whole), *options]) == 0
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_after(monkeypatch, 7, KeyboardInterrupt)
        assert main(["finetune", model, path, "--output", str(parts), *options]) == 130
    assert capsys.readouterr().err.endswith(
        "idlora: interrupted; the same command with --resume goes on from the last checkpoint\n"
    )
    assert not RESULTS & {path.name for path in parts.iterdir()}
    assert main(["finetune", model, path, "--output", str(parts), *options, "--resume"]) == 0

    expected, found = (load_file(output / "adapter_model.safetensors") for output in (whole, parts))
    assert expected.keys() == found.keys()
    for key in expected:
        assert torch.equal(expected[key], found[key]), key
    assert metrics_of(whole)["curve"] == metrics_of(parts)["curve"]


def test_resume_refuses_another_run(
    run: Path, model: str, pairs: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--every", "4", "--lr", "2e-2", "--dropout", "0.1", *ADAPTER]
    again = ["finetune", model, pairs, "--output", str(run), "--resume", *options]
    assert "already at step 12 of 12" in error_of(capsys, *again, "--steps", "12")
    assert "lr was 0.02 and is now 0.1" in error_of(capsys, *again, "--steps", "20", "--lr", "0.1")
    assert "adapter was" in error_of(capsys, *again, "--steps", "20", "--r", "4")
    other = ["finetune", model, text, "--output", str(run), "--resume", *options]
    assert "the data is not what it was" in error_of(capsys, *other, "--steps", "20")
    nothing = ["finetune", model, pairs, "--output", str(tmp_path / "none"), "--resume", *ADAPTER]
    assert "no complete checkpoint" in error_of(capsys, *nothing)


def test_an_unfinished_checkpoint_is_passed_over(run: Path, model: str, pairs: str, tmp_path: Path) -> None:
    import shutil

    output = tmp_path / "run"
    shutil.copytree(run, output)
    (output / "checkpoint-12" / "trainer_state.json").unlink()
    options = ["--every", "4", "--lr", "2e-2", "--dropout", "0.1", "--steps", "12", *ADAPTER]
    assert main(["finetune", model, pairs, "--output", str(output), "--resume", *options]) == 0
    expected, found = (load_file(path / "adapter_model.safetensors") for path in (run, output))
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_output_is_never_overwritten_unasked(
    model: str, pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint-99").mkdir()
    argv = ["finetune", model, pairs, "--output", str(tmp_path), "--steps", "1", *ADAPTER]
    assert "is not empty" in error_of(capsys, *argv)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "checkpoint-99"}
    assert main([*argv, "--overwrite"]) == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "checkpoint-99").exists()
    assert (tmp_path / "metrics.json").is_file()


def test_a_failed_run_leaves_the_earlier_results(
    run: Path, model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    output = tmp_path / "run"
    shutil.copytree(run, output)
    before = {name: (output / name).read_bytes() for name in RESULTS}
    stop_after(monkeypatch, 1, Stopped)
    with pytest.raises(Stopped):
        main(["finetune", model, pairs, "--output", str(output), "--overwrite", "--steps", "3", *ADAPTER])
    assert {name: (output / name).read_bytes() for name in RESULTS} == before


def test_finetune_options_reach_the_run(model: str, text: str, tmp_path: Path) -> None:
    options = (
        "--chat --length 48 --batch 2 --gradient-accumulation 2 --steps 2 --gradient-checkpointing --seed 3 --warmup 1"
    )
    fields = "--rank-boost 1 --scaling 0.5 --selection pivoted_qr --router bounded --row-scale --no-shared-router --target-modules q_proj,down_proj"
    argv = ["finetune", model, text, "--output", str(tmp_path / "run"), "--dtype", "bfloat16"]
    assert main([*argv, *options.split()[1:], *fields.split(), *ADAPTER]) == 0
    tensors = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert {key.split(".")[-2] for key in tensors} == {"q_proj", "down_proj"}
    assert {tuple(tensor.shape) for key, tensor in tensors.items() if key.endswith("router")} == {(2, 8)}
    assert {tuple(tensor.shape) for key, tensor in tensors.items() if key.endswith("_B")} == {(64, 8)}
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (config["scaling"], config["selection"], config["seed"]) == (0.5, "pivoted_qr", 3)
    assert (config["router"], config["row_scale"], config["shared_router"]) == ("bounded", True, False)


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
    model: str, pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert message in error_of(capsys, "finetune", model, pairs, "--output", str(tmp_path / "run"), *ADAPTER, *options)
    assert not (tmp_path / "run").exists()


def test_missing_files(model: str, pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing, output = str(tmp_path / "missing"), str(tmp_path / "run")
    assert "no such model directory" in error_of(capsys, "finetune", missing, pairs, "--output", output)
    assert "missing.jsonl" in error_of(capsys, "finetune", model, missing + ".jsonl", "--output", output)
    assert "adapter_config.json" in error_of(capsys, "generate", model, "--adapter", missing, "--prompt", "a")
    assert "no such model directory" in error_of(capsys, "inspect", missing)


def test_a_loss_that_is_not_finite_stops_the_run(
    model: str, pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["finetune", model, pairs, "--output", str(tmp_path), "--steps", "6", "--warmup", "0", "--lr", "1e30"]
    assert "try a lower learning rate" in error_of(capsys, *argv, *ADAPTER)
    assert not (tmp_path / "metrics.json").exists()


# --- generate --------------------------------------------------------------------------------------------------------


def test_generate_json_is_what_the_models_say(run: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", model, "--adapter", str(run), "--prompt", "7 times 0 is", "--max-new-tokens", "6", "--json"]
    assert main(argv) == 0
    (answer,) = json.loads(capsys.readouterr().out)

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer("7 times 0 is", return_tensors="pt")
    loaded = AutoModelForCausalLM.from_pretrained(model)
    for name in ("base", "adapted"):
        output = loaded.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids.input_ids.shape[1] :]
        assert answer[name] == tokenizer.decode(output, skip_special_tokens=True).strip()
        idlora_ext.load(loaded, run) if name == "base" else None
    assert answer["base"] != answer["adapted"]


@pytest.mark.parametrize("columns", [60, 140])
def test_generate_shows_both_answers(
    run: Path,
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    columns: int,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    (tmp_path / "prompts.txt").write_text("second\n\nthird\n")
    argv = ["generate", model, "--adapter", str(run), "--prompt", "first", "--max-new-tokens", "2"]
    assert main([*argv, "--prompt-file", str(tmp_path / "prompts.txt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in lines if line.strip() in ("first", "second", "third")] == [
        "first",
        "second",
        "third",
    ]
    together = [line for line in lines if "without the adapter" in line and "with the adapter" in line]
    assert len(together) == (3 if columns == 140 else 0)


def test_sampling_follows_the_seed(run: Path, model: str) -> None:
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    idlora_ext.load(loaded, run)
    answers = [compare(loaded, tokenizer, ["a"], temperature=1.0, seed=seed, max_new_tokens=8) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    chat = compare(loaded, tokenizer, ["a"], chat=True, max_new_tokens=8)
    assert chat != compare(loaded, tokenizer, ["a"], max_new_tokens=8)


def test_generate_needs_a_prompt(run: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--prompt" in error_of(capsys, "generate", model, "--adapter", str(run))
    assert "max_new_tokens" in error_of(
        capsys, "generate", model, "--adapter", str(run), "--prompt", "a", "--max-new-tokens", "0"
    )


# --- inspect ---------------------------------------------------------------------------------------------------------


def inspect_json(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["inspect", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_inspect_a_file_alone_agrees_with_the_model(
    run: Path, model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model)
    idlora_ext.load(loaded, run)
    expected = {row.name: row for row in idlora_ext.summary(loaded).rows}
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((run / "adapter_model.safetensors").read_bytes())
    for path in (run, alone):
        layers = inspect_json(capsys, str(path))["layers"]
        assert {layer["name"] for layer in layers} == set(expected)
        for layer in layers:
            row = expected[layer["name"]]
            assert all(layer[key] == getattr(row, key) for key in ("d", "d_in", "k", "r", "s", "trainable"))
            assert layer["B_rms"] > 0


def test_inspect_cluster_statistics(run: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model)
    tensors = load_file(run / "adapter_model.safetensors")
    for layer in inspect_json(capsys, str(run), "--base", model)["layers"]:
        W = loaded.get_submodule(layer["name"]).weight.detach().double()
        index = tensors[f"base_model.model.{layer['name']}.idlora_index"].long()
        means = [W[rows].mean(0) for rows in index]
        nearest = [min(range(len(means)), key=lambda i, w=w: float((w - means[i]).norm())) for w in W]
        parts = [W[[i == c for c in nearest]] for i in range(len(means))]
        inner = sum(float((part - part.mean(0)).square().sum()) for part in parts)
        found = layer["clusters"]
        assert found["sizes"] == [len(part) for part in parts]
        explained = 1 - inner / float((W - W.mean(0)).square().sum())
        assert found["variance_explained"] == pytest.approx(explained, abs=1e-5)
        assert found["chosen_norm"] == pytest.approx([float(W[rows].norm(dim=1).mean()) for rows in index], rel=1e-5)


def test_inspect_alpha_statistics(
    run: Path, model: str, text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plot = tmp_path / "alpha.png"
    options = ["--base", model, "--text", text, "--tokens", "64", "--plot", str(plot)]
    layers = inspect_json(capsys, str(run), *options)["layers"]
    assert plot.read_bytes().startswith(PNG)

    loaded = AutoModelForCausalLM.from_pretrained(model)
    idlora_ext.load(loaded, run)
    ids = AutoTokenizer.from_pretrained(model)(Path(text).read_text(), return_tensors="pt").input_ids[:, :64]
    seen = {}
    for name, module in loaded.named_modules():
        if isinstance(module, IdLoraLayer):
            module.register_forward_hook(lambda _, args, __, name=name: seen.update({name: args[0].detach()}))
    loaded(input_ids=ids)
    for layer in layers:
        alpha = loaded.get_submodule(layer["name"]).alpha(seen[layer["name"]])[0].double()
        assert alpha.shape == (64, 2)
        expected = {
            "mean": alpha.mean(0),
            "std": alpha.std(0, unbiased=False),
            "min": alpha.amin(0),
            "max": alpha.amax(0),
        }
        for key, value in expected.items():
            assert layer["alpha"][key] == pytest.approx(value.tolist(), rel=1e-4, abs=1e-6), (layer["name"], key)


def test_inspect_table(run: Path, model: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run), "--base", model, "--text", text]) == 0
    by_kind = capsys.readouterr().out
    assert by_kind.count("model.layers.*.self_attn.q_proj") == 1
    assert "14 layers" in by_kind
    assert main(["inspect", str(run), "--layers"]) == 0
    every = capsys.readouterr().out
    assert all(every.count(f"model.layers.{i}.self_attn.q_proj") == 1 for i in range(2))


def test_inspect_a_model_says_what_apply_would_do(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = inspect_json(capsys, model, *ADAPTER)
    applied = idlora_ext.apply(AutoModelForCausalLM.from_pretrained(model), r=8, num_clusters=2, progress=False)
    summary = idlora_ext.summary(applied)
    assert report["layers"] == [dict(vars(row)) for row in summary.rows]
    assert report["trainable_parameters"] == summary.trainable_parameters
    assert report["total_parameters"] == summary.total_parameters


def test_inspect_says_that_an_adapter_is_untrained(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    applied = idlora_ext.apply(AutoModelForCausalLM.from_pretrained(model), r=8, num_clusters=2, progress=False)
    idlora_ext.save(applied, tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    assert "B is zero in 14 layers" in capsys.readouterr().out


def test_inspect_errors(run: Path, model: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "give --base" in error_of(capsys, "inspect", str(run), "--text", text)
    assert "give --text" in error_of(capsys, "inspect", str(run), "--base", model, "--plot", "x.png")
    assert "holds no adapter" in error_of(capsys, "inspect", model, "--base", model)
    assert "is what it is" in error_of(capsys, "inspect", str(run), "--r", "4")
    assert "not an ID-LoRA adapter" in error_of(capsys, "inspect", str(Path(model) / "model.safetensors"))
    other = tmp_path / "other"
    tiny_llama(seed=1, vocab_size=260).save_pretrained(other)
    assert "another base model" in error_of(capsys, "inspect", str(run), "--base", str(other))


# --- the command itself ----------------------------------------------------------------------------------------------


def idlora(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "idlora_ext", *argv], capture_output=True, text=True, timeout=120)


def stderr_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    """All but what bitsandbytes and torchao say of themselves: PEFT imports them where they are installed."""
    of_libraries = re.compile(r"Failed to load (CPU gemm_4bit_forward|.*torchao)|W\d+ .*_pytree\.py")
    return [line for line in done.stderr.splitlines() if not of_libraries.match(line)]


def test_as_a_program(run: Path) -> None:
    inspect, error = idlora("inspect", str(run)), idlora("generate", "./missing", "--adapter", str(run))
    assert (inspect.returncode, stderr_lines(inspect)) == (0, [])
    assert "14 layers" in inspect.stdout
    assert (error.returncode, stderr_lines(error)) == (2, ["idlora: error: ./missing: no such model directory"])


@pytest.mark.parametrize("argv", [["--version"], ["--help"], *([name, "--help"] for name in ("finetune", "generate"))])
def test_help_and_version(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 0
    assert (idlora_ext.__version__ if argv == ["--version"] else "usage: idlora") in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["no-such-command"], ["finetune"], ["generate", "m", "--no-such-option"]])
def test_usage_errors_are_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "--help" in error_of(capsys, *argv)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such model directory"):
        main(["inspect", str(tmp_path / "missing"), "--debug"])


def test_documented_defaults_are_the_real_ones() -> None:
    parsed = vars(build_parser().parse_args(["finetune", "model", "data", "--output", "out"]))
    settings = Settings("model", ["data"], "out")
    shared = {name: value for name, value in vars(settings).items() if name in parsed}
    assert len(shared) > 20
    assert {name: parsed[name] for name in shared} == shared
    config = idlora_ext.IdLoraConfig()
    for name, _, text in ADAPTER_OPTIONS:
        default = getattr(config, name)
        assert parsed[name] is None
        assert default is None or f"{default:g}" in text if isinstance(default, float) else str(default or "") in text


def test_a_static_router_is_trained_inspected_and_exported(model, pairs, tmp_path, capsys):
    adapter, lora = str(tmp_path / "run"), str(tmp_path / "lora")
    options = ["--steps", "2", "--every", "2", *ADAPTER, "--router", "static"]
    assert main(["finetune", model, pairs, "--output", adapter, *options]) == 0
    assert main(["inspect", adapter, "--base", model, "--text", pairs]) == 0
    assert "a: the router's weights a_i" in capsys.readouterr().out
    assert main(["export", adapter, "--base", model, "--to", "lora", "--output", lora]) == 0
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
