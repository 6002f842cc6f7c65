"""The commands but ``finetune``, run for real on a tiny random model; and what all commands have in common."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import idlora_ext
from idlora_ext.cli import ADAPTER_OPTIONS, build_parser, main
from idlora_ext.layer.layer import IdLoraLayer
from idlora_ext.tools.finetune import Settings
from idlora_ext.tools.generation import compare
from tests.helpers.commands import ADAPTER, PNG, error_of
from tests.helpers.models import tiny_llama

# --- generate --------------------------------------------------------------------------------------------------------


def test_generate_json_is_what_the_models_say(
    run_path: Path, model_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "generate",
        model_path,
        "--adapter",
        str(run_path),
        "--prompt",
        "7 times 0 is",
        "--max-new-tokens",
        "6",
        "--json",
    ]
    assert main(argv) == 0
    (answer,) = json.loads(capsys.readouterr().out)

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    ids = tokenizer("7 times 0 is", return_tensors="pt")
    loaded = AutoModelForCausalLM.from_pretrained(model_path)
    for name in ("base", "adapted"):
        output = loaded.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids.input_ids.shape[1] :]
        assert answer[name] == tokenizer.decode(output, skip_special_tokens=True).strip()
        idlora_ext.load(loaded, run_path) if name == "base" else None
    assert answer["base"] != answer["adapted"]


@pytest.mark.parametrize("columns", [60, 140])
def test_generate_shows_both_answers(
    run_path: Path,
    model_path: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    columns: int,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    (tmp_path / "prompts.txt").write_text("second\n\nthird\n")
    argv = ["generate", model_path, "--adapter", str(run_path), "--prompt", "first", "--max-new-tokens", "2"]
    assert main([*argv, "--prompt-file", str(tmp_path / "prompts.txt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in lines if line.strip() in ("first", "second", "third")] == [
        "first",
        "second",
        "third",
    ]
    together = [line for line in lines if "without the adapter" in line and "with the adapter" in line]
    assert len(together) == (3 if columns == 140 else 0)


def test_sampling_follows_the_seed(run_path: Path, model_path: str) -> None:
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model_path), AutoTokenizer.from_pretrained(model_path)
    idlora_ext.load(loaded, run_path)
    answers = [compare(loaded, tokenizer, ["a"], temperature=1.0, seed=seed, max_new_tokens=8) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    chat = compare(loaded, tokenizer, ["a"], chat=True, max_new_tokens=8)
    assert chat != compare(loaded, tokenizer, ["a"], max_new_tokens=8)


def test_generate_needs_a_prompt(run_path: Path, model_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--prompt" in error_of(capsys, "generate", model_path, "--adapter", str(run_path))
    assert "max_new_tokens" in error_of(
        capsys, "generate", model_path, "--adapter", str(run_path), "--prompt", "a", "--max-new-tokens", "0"
    )


# --- inspect ---------------------------------------------------------------------------------------------------------


def inspect_json(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["inspect", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_inspect_a_file_alone_agrees_with_the_model(
    run_path: Path, model_path: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model_path)
    idlora_ext.load(loaded, run_path)
    expected = {row.name: row for row in idlora_ext.summary(loaded).rows}
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((run_path / "adapter_model.safetensors").read_bytes())
    for path in (run_path, alone):
        layers = inspect_json(capsys, str(path))["layers"]
        assert {layer["name"] for layer in layers} == set(expected)
        for layer in layers:
            row = expected[layer["name"]]
            assert all(layer[key] == getattr(row, key) for key in ("d", "d_in", "k", "r", "s", "trainable"))
            assert layer["B_rms"] > 0


@pytest.mark.parametrize("selection", ["nearest", "pivoted_qr_whole"])
def test_inspect_row_statistics(
    selection: str, model_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model_path)
    with torch.no_grad():  # a row twice among the chosen, and rows of zeros: what they span is not k r dimensions
        loaded.model.layers[0].self_attn.o_proj.weight[1:3] = loaded.model.layers[0].self_attn.o_proj.weight[0]
        loaded.model.layers[0].mlp.up_proj.weight[10:] = 0
    loaded.save_pretrained(tmp_path / "base")
    idlora_ext.apply(loaded, r=8, num_clusters=2, selection=selection, progress=False)
    idlora_ext.save(loaded, tmp_path / "run")
    layers = inspect_json(capsys, str(tmp_path / "run"), "--base", str(tmp_path / "base"))["layers"]
    assert len(layers) == 14
    for layer in layers:
        module = loaded.get_submodule(layer["name"])
        W, index = module.weight.detach().double(), module.idlora_adapter["default"].index.long()
        A, found = W[index.flatten()], layer["rows"]
        residual = W - W @ torch.linalg.pinv(A, rtol=1e-6) @ A
        assert found["spanned"] == pytest.approx(1 - float(residual.square().sum() / W.square().sum()), abs=1e-5)
        assert found["chosen_norm"] == pytest.approx([float(W[rows].norm(dim=1).mean()) for rows in index], rel=1e-5)
        assert found["norm"] == pytest.approx(float(W.norm(dim=1).mean()), rel=1e-5)
        if selection == "pivoted_qr_whole":  # no clusters, so nothing that a reader could take for them
            assert set(found) == {"spanned", "chosen_norm", "norm"}
            continue
        means = [W[rows].mean(0) for rows in index]
        nearest = [min(range(len(means)), key=lambda i, w=w: float((w - means[i]).norm())) for w in W]
        parts = [W[[i == c for c in nearest]] for i in range(len(means))]
        inner = sum(float((part - part.mean(0)).square().sum()) for part in parts)
        assert found["sizes"] == [len(part) for part in parts]
        explained = 1 - inner / float((W - W.mean(0)).square().sum())
        assert found["variance_explained"] == pytest.approx(explained, abs=1e-5)
    table = ["inspect", str(tmp_path / "run"), "--base", str(tmp_path / "base")]
    assert main(table) == 0
    shown = capsys.readouterr().out
    assert "spanned" in shown
    assert ("variance explained by the clusters" in shown) == (selection == "nearest")


def test_inspect_alpha_statistics(
    run_path: Path, model_path: str, text_path: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plot = tmp_path / "alpha.png"
    options = ["--base", model_path, "--text", text_path, "--tokens", "64", "--plot", str(plot)]
    layers = inspect_json(capsys, str(run_path), *options)["layers"]
    assert plot.read_bytes().startswith(PNG)

    loaded = AutoModelForCausalLM.from_pretrained(model_path)
    idlora_ext.load(loaded, run_path)
    ids = AutoTokenizer.from_pretrained(model_path)(Path(text_path).read_text(), return_tensors="pt").input_ids[:, :64]
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


def test_inspect_table(run_path: Path, model_path: str, text_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run_path), "--base", model_path, "--text", text_path]) == 0
    by_kind = capsys.readouterr().out
    assert by_kind.count("model.layers.*.self_attn.q_proj") == 1
    assert "14 layers" in by_kind
    assert main(["inspect", str(run_path), "--layers"]) == 0
    every = capsys.readouterr().out
    assert all(every.count(f"model.layers.{i}.self_attn.q_proj") == 1 for i in range(2))


def test_inspect_a_model_says_what_apply_would_do(model_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = inspect_json(capsys, model_path, *ADAPTER)
    applied = idlora_ext.apply(AutoModelForCausalLM.from_pretrained(model_path), r=8, num_clusters=2, progress=False)
    summary = idlora_ext.summary(applied)
    assert report["layers"] == [dict(vars(row)) for row in summary.rows]
    assert report["trainable_parameters"] == summary.trainable_parameters
    assert report["total_parameters"] == summary.total_parameters


def test_inspect_says_that_an_adapter_is_untrained(
    model_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    applied = idlora_ext.apply(AutoModelForCausalLM.from_pretrained(model_path), r=8, num_clusters=2, progress=False)
    idlora_ext.save(applied, tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    assert "B is zero in 14 layers" in capsys.readouterr().out


def test_inspect_errors(
    run_path: Path, model_path: str, text_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "give --base" in error_of(capsys, "inspect", str(run_path), "--text", text_path)
    assert "give --text" in error_of(capsys, "inspect", str(run_path), "--base", model_path, "--plot", "x.png")
    assert "holds no adapter" in error_of(capsys, "inspect", model_path, "--base", model_path)
    assert "is what it is" in error_of(capsys, "inspect", str(run_path), "--r", "4")
    assert "not an ID-LoRA adapter" in error_of(capsys, "inspect", str(Path(model_path) / "model.safetensors"))
    other = tmp_path / "other"
    tiny_llama(seed=1, vocab_size=260).save_pretrained(other)
    assert "another base model" in error_of(capsys, "inspect", str(run_path), "--base", str(other))


# --- the command itself ----------------------------------------------------------------------------------------------


def idlora(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "idlora_ext", *argv], capture_output=True, text=True, timeout=120)


def stderr_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    """All but what bitsandbytes and torchao say of themselves: PEFT imports them where they are installed."""
    of_libraries = re.compile(r"Failed to load (CPU gemm_4bit_forward|.*torchao)|W\d+ .*_pytree\.py")
    return [line for line in done.stderr.splitlines() if not of_libraries.match(line)]


@pytest.mark.subprocess
def test_as_a_program(run_path: Path) -> None:
    inspect, error = idlora("inspect", str(run_path)), idlora("generate", "./missing", "--adapter", str(run_path))
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


def test_missing_files(model_path: str, pairs_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing, output = str(tmp_path / "missing"), str(tmp_path / "run")
    assert "no such model directory" in error_of(capsys, "finetune", missing, pairs_path, "--output", output)
    assert "missing.jsonl" in error_of(capsys, "finetune", model_path, missing + ".jsonl", "--output", output)
    assert "adapter_config.json" in error_of(capsys, "generate", model_path, "--adapter", missing, "--prompt", "a")
    assert "no such model directory" in error_of(capsys, "inspect", missing)


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
        default = getattr(config, name, None)  # a preset is an argument, no field
        assert parsed[name] is None
        assert default is None or f"{default:g}" in text if isinstance(default, float) else str(default or "") in text


def test_a_static_router_is_trained_inspected_and_exported(model_path, pairs_path, tmp_path, capsys):
    adapter, lora = str(tmp_path / "run"), str(tmp_path / "lora")
    options = ["--steps", "2", "--every", "2", *ADAPTER, "--router", "static"]
    assert main(["finetune", model_path, pairs_path, "--output", adapter, *options]) == 0
    assert main(["inspect", adapter, "--base", model_path, "--text", pairs_path]) == 0
    assert "a: the router's weights a_i" in capsys.readouterr().out
    assert main(["export", adapter, "--base", model_path, "--to", "lora", "--output", lora]) == 0
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
