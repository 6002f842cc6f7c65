"""What a training run does around a model, in one process: checkpointing, compiling, autocast, accumulation, TRL."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch._dynamo.utils import counters
from transformers import Trainer, TrainingArguments

import idlora_ext
from idlora_ext import IdLoraConfig
from tests.helpers.models import FIELDS, MODELS, layers_of, logits, randomize_adapter, tiny_llama
from tests.helpers.problems import every_pair, named

KINDS = ("llama", "gpt2", "qwen2")
DOORS = {
    "apply": lambda model, **fields: idlora_ext.apply(model, **FIELDS | fields, progress=False),
    "get_peft_model": lambda model, **fields: get_peft_model(model, IdLoraConfig(**FIELDS | fields)),
}


def batch(size=2, length=9, seed=0):
    ids = torch.randint(0, 101, (size, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def gradients(model, *batches, run=None, scale=1.0):
    """Loss and gradients, summed over the batches as accumulation does it; ``scale`` as a gradient scaler has it."""
    model.zero_grad()
    losses = []
    for one in batches:
        loss = (model if run is None else run)(**one).loss / len(batches)
        (scale * loss).backward()
        losses.append(loss.detach())
    return sum(losses), {n: p.grad / scale for n, p in model.named_parameters() if p.requires_grad}


def assert_same(ours, theirs, **tolerance):
    torch.testing.assert_close(ours[0], theirs[0], **tolerance)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(ours[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@every_pair(kind=named(KINDS), door=named(DOORS), use_reentrant=named([True, False]))
def test_gradient_checkpointing_changes_no_bit(kind, door, use_reentrant):
    model = randomize_adapter(DOORS[door](MODELS[kind].make())).train()
    for module in model.modules():  # GPT-2 has dropout
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain = gradients(model, batch())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        model(**batch())
    assert not any(len(shape) == 4 and shape[-2:] == (2, 8) for shape in kept)  # x [batch, length, k, r] is not kept
    assert_same(gradients(model, batch()), plain, rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("door", DOORS)
def test_trainer_with_gradient_checkpointing_and_accumulation(door, use_reentrant, tmp_path):
    """Two micro-batches of two, checkpointed, are one batch of four."""

    def train(name, **options):
        model = randomize_adapter(DOORS[door](tiny_llama()))
        arguments = TrainingArguments(
            output_dir=str(tmp_path / name),
            max_steps=3,
            learning_rate=1e-2,
            logging_steps=1,
            optim="sgd",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            save_strategy="no",
            **options,
        )
        rows = [{key: values[0] for key, values in batch(1, 12, seed=i).items()} for i in range(12)]
        run = Trainer(model, arguments, train_dataset=rows)
        run.train()
        return [e["loss"] for e in run.state.log_history if "loss" in e], dict(model.named_parameters())

    whole = train("whole", per_device_train_batch_size=4)
    parts = train(
        "parts",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    for name, parameter in whole[1].items():
        torch.testing.assert_close(parts[1][name], parameter, rtol=1e-4, atol=1e-6)


def test_accumulated_gradients_are_those_of_the_big_batch():
    model = randomize_adapter(DOORS["apply"](tiny_llama())).double().train()
    whole = batch(4)
    parts = [{key: values[i : i + 1] for key, values in whole.items()} for i in range(4)]
    assert_same(gradients(model, *parts), gradients(model, whole), rtol=1e-9, atol=1e-12)


@pytest.mark.compiled
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_compiled_training_has_one_graph_for_every_step_and_length(checkpointed):
    torch._dynamo.reset()
    model = randomize_adapter(DOORS["apply"](tiny_llama(num_hidden_layers=1))).train()
    for module in layers_of(model).values():  # with biases
        module.base_layer.bias = torch.nn.Parameter(torch.randn(module.out_features), requires_grad=False)
    if checkpointed:
        model.config.use_cache = False  # or transformers warns, which breaks the graph
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()  # a hook for reentrant checkpointing alone, which breaks the graph too
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    counters.clear()
    gradients(model, batch(2, 8), run=compiled)
    graphs = counters["stats"]["unique_graphs"]
    with torch.compiler.set_stance("fail_on_recompile"):
        for step, length in enumerate((9, 8, 17, 30)):
            optimizer.step()
            one = batch(2, length, seed=step)
            assert_same(gradients(model, one, run=compiled), gradients(model, one), rtol=1e-3, atol=1e-5)
    assert graphs == counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.compiled
def test_compiled_with_several_adapters_and_with_none():
    """One graph for each set of active adapters, found again when the set comes back."""
    torch._dynamo.reset()
    model = DOORS["get_peft_model"](tiny_llama(num_hidden_layers=1))
    model.add_adapter("other", IdLoraConfig(**FIELDS, seed=1))
    for name in ("default", "other"):
        randomize_adapter(model, name, seed=len(name))
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    counters.clear()

    def run(name):
        if name is None:
            with model.disable_adapter(), torch.no_grad():
                return compiled(**batch()).logits, model(**batch()).logits
        model.base_model.set_adapter(["default", "other"] if name == "both" else name)
        with torch.no_grad():
            return compiled(**batch()).logits, model(**batch()).logits

    states = ("default", "other", "both", None)
    first = {state: run(state)[0] for state in states}
    assert len({tuple(t.flatten()[:5].tolist()) for t in first.values()}) == len(states)
    with torch.compiler.set_stance("fail_on_recompile"):
        for state in states:
            ours, theirs = run(state)
            assert torch.equal(ours, first[state])
            torch.testing.assert_close(ours, theirs)
    assert not counters["graph_break"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_forward_and_backward(kind, dtype):
    """No further from float64 than the same model with its adapters in plain PyTorch: twice, gradients three times."""
    model = randomize_adapter(DOORS["apply"](MODELS[kind].make())).eval()
    scale = 2.0**14 if dtype == torch.float16 else 1.0
    with torch.autocast("cpu", dtype):
        low = gradients(model, batch(4, 16), scale=scale)
    assert all(g.dtype == torch.float32 for g in low[1].values())
    exact = gradients(model.double(), batch(4, 16))
    reference = _explicit(model.float())
    with torch.autocast("cpu", dtype):
        plain = gradients(reference, batch(4, 16), scale=scale)
    sizes = {name: gradient.norm() for name, gradient in exact[1].items()}
    ours, theirs = ({name: (g[1][name].double() - exact[1][name]).norm() for name in sizes} for g in (low, plain))
    # Of a saturated softmax plain PyTorch finds no digit: an attention's gradients are rounding alone. These are compared
    # as one, and with those of several batches, since the size of one rounding is luck.
    rounding = {}
    lost = [name for name, size in sizes.items() if theirs[name] >= size]
    for seed in range(8 if lost else 0):
        with torch.autocast("cpu", dtype):
            found = gradients(reference, batch(4, 16, seed=seed), scale=scale)[1]
        for name in lost:
            attention = name.rsplit(".", 3)[0]
            rounding[attention] = max(rounding.get(attention, 0.0), theirs[name], found[name].norm())
    for name, size in sizes.items():
        allowed = rounding[name.rsplit(".", 3)[0]] if name in lost else theirs[name]
        assert ours[name] <= 3 * allowed + 1e-6 * size, (name, ours[name], allowed)
    assert (low[0] - exact[0]).abs() <= 2 * (plain[0] - exact[0]).abs() + torch.finfo(dtype).eps * exact[0]


def _explicit(model):
    """The same model with its adapters written out in plain PyTorch operations, as autocast treats any other code."""

    def adapt(adapters, base):
        (adapter,) = adapters
        y0, bias = base.y0, base.bias
        index, router, B = adapter.tensors(y0.dtype)
        x = y0[..., index.long()]
        z = ((x * router).sum(-1, keepdim=True) * x).sum(-2)
        s = y0.shape[-1] // B.shape[0]
        parts = z.unflatten(-1, (s, -1)) @ B.t()
        y = y0 + adapter.scaling * parts.flatten(-2)
        return (y if bias is None else y + bias).to(y0.dtype)

    for layer in layers_of(model).values():
        assert hasattr(layer, "_adapt")  # or nothing would be replaced
        layer._adapt = adapt
    return model


@pytest.mark.parametrize("door", DOORS)
def test_trl_trains_saves_and_reloads(door, tmp_path):
    """SFTTrainer makes the adapter itself (``peft_config``) or takes a model that has one."""
    pytest.importorskip("trl", reason="SFTTrainer: pip install trl")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"input_ids": batch(1, 12, seed=i)["input_ids"][0].tolist()} for i in range(4)]
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    model, config = tiny_llama(), None
    if door == "apply":
        DOORS[door](model)
    else:
        config = IdLoraConfig(**FIELDS)
    run = SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), peft_config=config, **_tokenizer())
    assert isinstance(run.model, PeftModel) == (door != "apply")
    trainable = {n for n, p in run.model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".idlora_" in name for name in trainable)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert all(layer.idlora_adapter["default"].B.abs().sum() > 0 for layer in layers_of(run.model).values())
    run.save_model(str(tmp_path / "final"))
    for directory in ("final", "checkpoint-8"):
        reloaded = idlora_ext.load(tiny_llama(), tmp_path / directory)
        assert torch.equal(logits(reloaded), logits(run.model.eval()))
    run = SFTTrainer(
        tiny_llama() if config else DOORS["apply"](tiny_llama()),
        arguments,
        train_dataset=Dataset.from_list(rows),
        peft_config=config,
        **_tokenizer(),
    )
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [entry["loss"] for entry in run.state.log_history if "loss" in entry] == losses


def _tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"<{i}>": i for i in range(101)}, unk_token="<0>"))
    return {
        "processing_class": PreTrainedTokenizerFast(
            tokenizer_object=words, unk_token="<0>", pad_token="<1>", eos_token="<2>"
        )
    }
