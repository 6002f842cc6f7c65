"""The comparison's whole cycle on a tiny model: run, resume, skip, refuse, report; and the parts it stands on."""

from __future__ import annotations

import gzip
import json
import random
import re
import shutil
import sys
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from compare import __main__ as cli
from compare import budget, cost, methods, objectives, report, roofline, run, studies, tasks
from compare.experiment import Experiment, adapter_behaviour, model_digest, write_json
from compare.hydralora import HydraLinear, apply_hydralora
from harness import limits, traffic
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from idlora_ext import IdLoraConfig
from tests.helpers.models import tiny_gpt2, tiny_llama
from tests.helpers.problems import each, named

WORDS = ["".join(pair) for pair in product("abcdefgh", repeat=2)][:60]  # digits would not tell documents apart


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with a tiny Llama and a tokenizer, and the data of all tasks, in the environment's folders."""
    folder = tmp_path_factory.mktemp("compare")
    words = ["<end>", "<unk>", "Answer:", "Headline:", "Sarcastic:", "yes", "no", *WORDS]
    words += [str(i) for i in range(30)]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", unk_token="<unk>").save_pretrained(folder)
    tiny_llama(vocab_size=101, max_position_embeddings=256).save_pretrained(folder)
    rng = random.Random(0)

    def text():
        return " ".join(rng.choices(WORDS, k=12))

    math = [{"question": text(), "choices": ["1", "2", "3"], "answer": str(rng.randint(1, 3))} for _ in range(800)]
    headlines = [{"text": text(), "label": str(rng.randint(0, 1))} for _ in range(800)]
    for name, records in (("elementary_math_qa", math), ("sarcasm", headlines)):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IDLORA_COMPARE_DATA", str(folder))
        patch.setenv("IDLORA_CACHE", str(folder / "cache"))
        patch.setattr(tasks, "_novels", lambda: [[text() for _ in range(4000)]])
        tasks.task_digest("mixture", folder.resolve(), 128)  # tokenised once; other processes find it in the cache
        yield folder


def experiment(model, method="lora-r8", **fields):
    return Experiment(**{"method": method, "task": "math", "lr": 1e-3, "steps": 3, "model": str(model)} | fields)


def study(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, arguments)])
    code = cli.main()
    return code, capsys.readouterr()


@pytest.mark.subprocess
def test_cycle(model, tmp_path, monkeypatch, capsys):
    options = ["lr", "--model", model, "--steps", 3, "--results", tmp_path, "--only", "idlora-r32"]
    code, output = study(monkeypatch, capsys, *options, "--limit", 1, "--jobs", 2)
    assert code == 0, output.err
    [file] = (tmp_path / "lr").iterdir()
    result = json.loads(file.read_text())
    assert result["key"] == experiment(model, "idlora-r32").key()
    # A fresh process and this one compute the same.
    again = run.measure(experiment(model, "idlora-r32"))
    torch.set_num_threads(1)
    assert again["train"]["loss"] == pytest.approx(result["train"]["loss"], rel=1e-5)
    assert result["metrics"]["held_out_loss"]["after"] < result["metrics"]["held_out_loss"]["before"]

    # Resumed: what is there is not run again, and a rate of each side is missing.
    _, output = study(monkeypatch, capsys, *options, "--list")
    assert file.stem not in output.out
    assert output.out.splitlines()[-1] == "2 of 3 to be run"

    # Another experiment under the same name is refused, or redone.
    with pytest.raises(SystemExit, match="2"):
        study(monkeypatch, capsys, *options[:4], 5, *options[5:], "--list")
    assert "steps was 3 and is 5. Move it away, give another --results, or --redo" in capsys.readouterr().err
    write_json(file, result | {"behaviour": [value + 1 for value in result["behaviour"]]})
    with pytest.raises(SystemExit, match="2"):
        study(monkeypatch, capsys, *options, "--list")
    assert "the adapter's code computes" in capsys.readouterr().err
    _, output = study(monkeypatch, capsys, *options, "--list", "--redo")
    assert file.stem in output.out


@each(
    method=named(["full", "lora-fa-r8", "hydralora-r4", "vera-r256", "idlora-r32-static"]),
    dtype=named(["bfloat16", "float32"]),
)
def test_a_run_of_each_kind(model, method, dtype):
    result = run.measure(experiment(model, method, task="mixture", dtype=dtype))
    metrics = result["metrics"]
    assert len(result["train"]["loss"]) == 3
    assert set(metrics["accuracy"]) == {"math", "sarcasm"}
    assert list(metrics["held_out_curve"]) == ["0", "1", "2", "3"]
    assert bool(metrics["alpha"]) == method.startswith("idlora")
    # The file holds what is trained, at least: VeRA's also its projections, ID-LoRA's also its rows.
    assert metrics["adapter_bytes"] > metrics["trainable_parameters"] * 2


def test_an_encoder_classifies(model, tmp_path):
    """Padding changes nothing, the classifier is trained, and a study of an encoder has that one task."""
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=101, **sizes)).save_pretrained(tmp_path)
    PreTrainedTokenizerFast(
        tokenizer_file=str(model / "tokenizer.json"), unk_token="<unk>", pad_token="<end>"
    ).save_pretrained(tmp_path)
    base = studies.base_experiment(str(tmp_path), steps=3)
    assert {one.task for one in studies.lr_study(base, lambda one: None)} == {"headlines"}
    result = run.measure(replace(base, method="idlora-r32", lr=1e-2))
    assert result["metrics"]["accuracy"]["headlines"] > 0
    assert result["train"]["loss"][0] == pytest.approx(0.7, abs=0.1)

    [part] = tasks.load_task("headlines", tmp_path.resolve(), 128).values()
    adapted = methods.apply(objectives.load(tmp_path, torch.float32), methods.METHODS["idlora-r32"].adapter).eval()
    assert any("classifier" in name for name, p in adapted.named_parameters() if p.requires_grad)
    rows = part.held_out[:8]
    assert (rows[:, 0] == 0).any()
    alone = torch.cat([objectives.losses(adapted, row) for row in rows.split(1)])
    torch.testing.assert_close(objectives.losses(adapted, rows), alone)


def test_failure_is_reported_and_nothing_is_written(model, tmp_path, monkeypatch):
    bad = json.dumps(vars(experiment(model, override={"no_such_field": 1})))
    monkeypatch.setattr(sys, "argv", ["run", bad, "--output", str(tmp_path / "x.json")])
    with pytest.raises(SystemExit, match=r"x: LoraConfig does not take these settings.*no_such_field"):
        run.main()
    assert not list(tmp_path.iterdir())


def test_a_model_is_the_same_whichever_transformers_wrote_it(model, tmp_path):
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    digest = model_digest.__wrapped__(model)
    for name, value, same in (("transformers_version", "1.0", True), ("rms_norm_eps", 1e-3, False)):
        (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
        assert (model_digest.__wrapped__(tmp_path) == digest) is same


def test_rates_are_extended_while_the_best_is_at_the_edge(model):
    base = experiment(model, "none", lr=0.0)
    found = {}

    def find(one):
        return found.get((one.task, one.method, one.lr))

    def rates(task, method="lora-r8"):
        return [lr for at, of, lr in found if (at, of) == (task, method)]

    def loss(value):
        return {"metrics": {"held_out_loss": {"after": value}}}

    # On math the lower the rate, the better, down to 3e-5; on the others the higher.
    for one in studies.lr_study(base, find):
        found[one.task, one.method, one.lr] = loss(abs(one.lr - 3e-5) if one.task == "math" else -one.lr)
    assert rates("math") == [1e-3, 3e-4, 3e-3, 1e-4, 3e-5, 1e-5]
    assert studies.best_rate("lora-r8", "math", base, find) == 3e-5
    assert rates("sarcasm") == rates("mixture") == [3e-5, 1e-5, *methods.LADDER[2:]]
    assert studies.best_rate("lora-r8", "sarcasm", base, find) == 1e-1
    assert rates("math", "dora-r8")
    assert not rates("sarcasm", "dora-r8")
    compared = list(studies.quality(base, find))
    assert {one.lr for one in compared if one.method == "lora-r8"} == {3e-5, 1e-1}
    ran = [(one.task, one.seed) for one in compared if one.method == "miss-r8"]
    assert sorted(ran) == sorted([*product(studies.QUALITY_TASKS, (0, 1, 2)), *product(["sarcasm"], (3, 4, 5))])

    found["math", "lora-r8", 3e-5] = loss(float("nan"))  # diverged
    assert studies.best_rate("lora-r8", "math", base, find) == 1e-5
    del found["math", "lora-r8", 3e-3]  # one of the first is missing: nothing is known, nor where to start elsewhere
    assert studies.best_rate("lora-r8", "math", base, find) is None
    assert not [one for one in studies.quality(base, find) if one.method == "lora-r8"]


def test_report(model, tmp_path):
    base = experiment(model, "none", lr=0.0)
    done = run.measure(experiment(model))
    for method in studies.TELLING:
        for rate in studies._first_rates(method, "math", base, lambda one: None):
            one = experiment(model, method, lr=rate)
            loss = 1.0 + abs(rate - 1e-3) + 0.1 * (method == "miss-r8")
            fake = done | {"key": one.key(), "settings": one.settings(), "variant": one.variant}
            fake["behaviour"] = adapter_behaviour(json.dumps(one.adapter))
            fake["metrics"] = done["metrics"] | {"held_out_loss": {"before": 2.0, "after": loss}}
            write_json(one.file(tmp_path / "lr"), fake)
    text = re.sub(" +", " ", report.Report(tmp_path, base).write().read_text())
    assert "| miss-r8 | | | | 1.1007 | **1.1000** | 1.1020 | | | | 0.001 |" in text
    rows = [row for row in text.splitlines() if row.startswith("| miss-r8 | 0.001 |")]
    assert "| 1.1000 (1 of 3) | +0.1000 (1 of 3); ahead in 0 |" in rows[0]
    assert "| 1.0000 (1 of 3) |" in text  # the ablations take the very same experiment from the other study
    assert (tmp_path / f"{model.name}--quality_math.svg").is_file()
    assert (tmp_path / f"{model.name}--differences.svg").is_file()


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_starts_at_the_base_model_and_learns(name):
    adapter = methods.METHODS[name].adapter
    try:
        methods.config(adapter)
    except ValueError as error:
        pytest.skip(f"not in this version: {error}")
    losses = methods.behaviour(adapter)
    if adapter["kind"] == "none":
        assert not losses
        return
    assert losses[0] == methods.behaviour({"kind": "full"})[0]
    assert losses[-1] < losses[0]


def test_a_budget_has_the_parameters_of_one_rank_for_all(model):
    base = studies.base_experiment(str(model))
    found = budget.gradients(base)
    ranks = budget.allocate(found, 8, 2)
    assert found.keys() == ranks.keys()
    assert all(rank % 2 == 0 and rank <= found[name][2] for name, rank in ranks.items())
    parameters = sum(found[name][1] * rank / 8 for name, rank in ranks.items())
    assert 0.9 < parameters / sum(numel for _, numel, _ in found.values()) <= 1
    narrow = [name for name in found if name.endswith("k_proj")]
    doubled = {name: (2 * g if name in narrow else g, n, w) for name, (g, n, w) in found.items()}
    after = budget.allocate(doubled, 8, 2)
    assert sum(after[name] for name in narrow) > sum(ranks[name] for name in narrow)
    adapter = methods.METHODS["idlora-r32-budget"].adapter
    with pytest.raises(ValueError, match=r"budget.json .* no rank for transformer.h.0.attn.c_attn.*compare.budget"):
        methods.apply(tiny_gpt2(), adapter)


def test_hydralora_is_its_loop():
    torch.manual_seed(0)
    layer = HydraLinear(torch.nn.Linear(12, 20), r=4, experts=3, alpha=8)
    torch.nn.init.normal_(layer.hydra_B)
    h = torch.randn(2, 5, 12)
    w = (h @ layer.hydra_gate.T).softmax(-1)
    expected = layer.base_layer(h)
    for i in range(3):
        expected = expected + 2 * w[..., i : i + 1] * (h @ layer.hydra_A.T @ layer.hydra_B[:, 4 * i : 4 * i + 4].T)
    torch.testing.assert_close(layer(h), expected)
    model = apply_hydralora(tiny_llama(), r=4, experts=3, alpha=8)
    assert sum(isinstance(m, HydraLinear) for m in model.modules()) == 14
    assert all("hydra_" in name for name, p in model.named_parameters() if p.requires_grad)
    with pytest.raises(ValueError, match=r"no torch\.nn\.Linear beside its output head"):
        apply_hydralora(tiny_gpt2(), r=4, experts=3, alpha=8)


def test_split_is_disjoint_and_labels_follow(model):
    [part] = tasks.load_task("sarcasm", model.resolve(), 128).values()
    assert part.train.shape[1:] == part.held_out.shape[1:] == (2, 128)
    kept = part.train[:, 1] != -100
    assert torch.equal(part.train[:, 1][kept], part.train[:, 0][kept])
    assert set(part.train[:, 1][kept].tolist()) == {0, 5, 6}  # the end of the text, yes and no

    def documents(rows):
        text = rows[:, 0].flatten().tolist()
        ends = [i for i, token in enumerate(text) if token == 0]
        return {tuple(text[a + 1 : b - 2]) for a, b in pairwise(ends)}

    mixture = tasks.load_task("mixture", model.resolve(), 128)
    assert len({len(each.train) for each in mixture.values()}) == 1
    assert torch.equal(tasks.load_task("sarcasm", model.resolve(), 128)["sarcasm"].train, part.train)
    assert documents(part.train)
    assert not documents(part.train) & documents(part.held_out)


def test_accuracy_is_that_of_one_choice_at_a_time():
    model = tiny_llama()
    problems = [([1, 2, 3], [[4], [5], [6, 7]], 1), ([9, 8], [[7, 7, 2], [1]], 0), ([3], [[2], [1]], 1)]
    right = 0
    for prompt, choices, answer in problems:
        scores = []
        for choice in choices:
            with torch.no_grad():
                likelihood = model(torch.tensor([prompt + choice])).logits[0].log_softmax(-1)
            scores.append(sum(likelihood[len(prompt) - 1 + i, token].item() for i, token in enumerate(choice)))
        right += scores.index(max(scores)) == answer
    assert objectives.choice_accuracy(model, problems, "cpu", batch=2) == right / 3


@pytest.mark.subprocess
def test_costs_are_measured_in_fresh_processes_and_tabulated(model, tmp_path, monkeypatch, capsys):
    output = tmp_path / "cost.json"
    options = ["--model", model, "--repeats", 1, "--steps", 1, "--batch", 1, "--length", 32, "--output", output]
    monkeypatch.setattr(sys, "argv", ["cost", *map(str, options), "--methods", "none", "lora-r8"])
    cost.main()
    figures = json.loads(output.read_text())["summary"]
    assert figures["none"]["trainable_parameters"] == figures["none"]["optimizer_bytes"] == 0
    lora = figures["lora-r8"]
    assert lora["optimizer_bytes"] >= 2 * 4 * lora["trainable_parameters"] > 0  # two moments
    assert lora["adapter_bytes"] > 4 * lora["trainable_parameters"]
    assert lora["saved_bytes"] > figures["none"]["saved_bytes"] > 0
    assert lora["decode_cpu_over_frozen"] > 1
    assert lora["decode_cpu_seconds"] > 0
    assert lora["step_cpu_seconds_over_none"] == lora["step_cpu_seconds"] / figures["none"]["step_cpu_seconds"]
    assert "| lora-r8 |" in capsys.readouterr().out

    before = output.read_bytes()
    monkeypatch.setattr(cost, "subprocess", None)  # what is there is not measured again
    cost.main()
    assert "| lora-r8 |" in capsys.readouterr().out
    assert output.read_bytes() == before
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(cost, "describe", lambda: {"cpu": "another"})
        with pytest.raises(SystemExit):
            cost.main()
    assert "is from another machine" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--threads", "2"])
    with pytest.raises(SystemExit):
        cost.main()
    assert "is of threads=1, not 2" in capsys.readouterr().err
    assert output.read_bytes() == before


def test_defaults_that_move_leave_the_papers_form_what_it_was():
    ours, paper = methods.config(methods.METHODS["idlora-r32"].adapter), IdLoraConfig(preset="paper", r=32)
    fields = "router", "shared_router", "selection", "row_scale", "center", "num_clusters", "rank_boost", "scaling"
    for field in fields:
        assert getattr(ours, field) == getattr(paper, field), field


def test_roofline_counts_each_operator(monkeypatch):
    a, b, c = torch.zeros(8, 4), torch.zeros(4, 2).bfloat16(), torch.zeros(4, 6).bfloat16()
    with roofline.Modelled() as modelled:
        a.t()  # a view
        a + 1
        (b.t() @ c).view(-1)
    moved, products = 2 * 32 * 4 + 2 * (8 + 24 + 12), 2 * 2 * 4 * 6
    assert (modelled.bytes, modelled.flops) == (moved, products)
    assert modelled.seconds == pytest.approx(moved / roofline.BANDWIDTH)
    weight = torch.nn.Parameter(torch.zeros(2, 4))
    with FakeTensorMode(allow_non_fake_inputs=True):
        h = torch.zeros(8, 4)
        with roofline.Modelled() as modelled:
            torch.nn.functional.linear(h, weight)  # a fake tensor is asked for its device, and the weight for a view
    assert modelled.bytes == 4 * (8 * 4 + 2 * 4 + 8 * 2)

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setattr(roofline, "LLAMA_3_8B", {**sizes, "head_dim": 16})
    once, twice = (roofline.count("idlora-r32-static", batch, 16) for batch in (1, 2))
    frozen = roofline.count("none", 1, 16)
    assert frozen["parameters"] == 0 < once["parameters"]
    for phase in ("forward", "backward"):
        assert once[f"{phase}_bytes"] > frozen[f"{phase}_bytes"]
        assert twice[f"{phase}_flops"] == 2 * once[f"{phase}_flops"]
    widths = [64, 32, 32, 64, 128, 128, 64]  # ranks that fit: 16 of 64, 8 of 32, 32 of 128
    ranks = [16, 8, 8, 16, 32, 32, 16]
    products = sum(2 * 16 * d * r // 2 for d, r in zip(widths, ranks, strict=True))
    assert once["forward_flops"] - frozen["forward_flops"] == products
    assert once["backward_flops"] - frozen["backward_flops"] == 2 * products


def test_missing_data_says_where_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.setenv("IDLORA_COMPARE_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="set IDLORA_COMPARE_DATA to the folder that holds it"):
        next(tasks.sarcasm())


def test_eager_traffic_lies_between_the_limit_and_the_equations_as_written():
    sizes = 64, 128, 2, 8, 2
    ours, written = (count(*sizes, torch.float32) for count in (traffic.default_kernels, traffic.as_written))
    assert limits.forward_limit(*sizes, 4, 4, 4, training=True) < ours["forward"] < written["forward"]
    assert limits.backward_limit(*sizes, 4, 4, 4) < ours["backward"] < written["backward"]
