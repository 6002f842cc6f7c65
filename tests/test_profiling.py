"""NVTX ranges as a profiler receives them, and the shapes of a run."""

from __future__ import annotations

import copy
import json
import sys
import threading
from collections import Counter

import profile_nsight
import pytest
import torch
from profile_nsight import distinct

import idlora_ext
from idlora_ext import profiling
from idlora_ext.ops import nvtx
from tests.helpers.models import FIELDS, inputs, tiny_llama

# ---- ranges ----------------------------------------------------------------------------------------------------------
# Each scenario runs under the recorder, all in one process of their own: NVTX looks for a profiler only once.


def adapted(**fields):
    model = idlora_ext.apply(tiny_llama(), progress=False, **FIELDS, **fields)
    model.enable_input_require_grads()  # or the first block's y0 needs no gradient
    return model


def step(model):
    model(**inputs()).logits.sum().backward()


def off():
    step(adapted())


def on():
    model = adapted()
    before = model(**inputs()).logits.sum()
    with profiling.nvtx_ranges():
        step(model)
        before.backward()  # its forward pass had none
    step(model)


def single_ops():
    with profiling.nvtx_ranges():
        step(adapted(dropout=0.5).train())


def checkpointed():
    model = adapted().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with profiling.nvtx_ranges():
        step(model)


def backward_thread():
    with profiling.nvtx_ranges():
        loss = adapted()(**inputs()).logits.sum()
        thread = threading.Thread(target=loss.backward)  # as autograd does for CUDA
        thread.start()
        thread.join()


def compiled():
    torch._dynamo.config.error_on_recompile = True  # for the switch, or for another layer's name
    model = adapted()
    first, second = (block.self_attn.q_proj for block in model.model.layers)
    h = torch.randn(3, 64, requires_grad=True)
    first.compile(fullgraph=True)
    second.compile(fullgraph=True)

    def gradients(layer):
        y = layer(h)
        return y, *torch.autograd.grad(y.square().sum(), (h, layer.idlora_adapter["default"].B))

    without = gradients(first)
    with profiling.nvtx_ranges():
        assert all(map(torch.equal, without, gradients(first)))
        gradients(second)


SCENARIOS = (off, on, single_ops, checkpointed, backward_thread, compiled)


def run_scenarios():
    import nvtx

    for scenario in SCENARIOS:
        nvtx.push_range(scenario.__name__, domain="scenario")
        scenario()
        nvtx.pop_range(domain="scenario")


@pytest.fixture(scope="session")
def recorded(record):
    return record("-c", "from tests import test_profiling; test_profiling.run_scenarios()", IDLORA_NVTX="")


def ranges(*phases_and_ops: tuple[str, str]) -> Counter:
    layers = [row.name for row in idlora_ext.summary(adapted()).rows]
    assert len(layers) == 14
    assert "model.layers.1.self_attn.q_proj" in layers
    return Counter(f"{layer} | {phase} | idlora::{op}" for layer in layers for phase, op in phases_and_ops)


ADAPT = (("forward", "adapt"), ("backward", "adapt_backward"))


@pytest.mark.subprocess
def test_no_ranges_by_default(recorded):
    assert recorded["off"] == []
    assert recorded[""] == [], "something lies between the scenarios"


@pytest.mark.subprocess
def test_ranges_name_layer_phase_and_op(recorded):
    assert Counter(recorded["on"]) == ranges(*ADAPT)
    forward, backward = recorded["on"][:14], recorded["on"][14:]
    assert forward[0] == "model.layers.0.self_attn.q_proj | forward | idlora::adapt"
    assert forward[-1] == "model.layers.1.mlp.down_proj | forward | idlora::adapt"
    assert backward[0] == "model.layers.1.mlp.down_proj | backward | idlora::adapt_backward"


@pytest.mark.subprocess
def test_ranges_of_the_single_ops(recorded):
    single = ("cluster_gather", "rb_scale", "shared_gemm")
    both = [*(("forward", op) for op in single), *(("backward", f"{op}_backward") for op in single)]
    assert Counter(recorded["single_ops"]) == ranges(*both)


@pytest.mark.subprocess
def test_checkpointed_blocks_run_outside_backward_ranges(recorded):
    """Recomputation starts when saved tensors are asked for. (That no ranges are nested the recorder has checked.)"""
    assert Counter(recorded["checkpointed"]) == ranges(("forward", "adapt"), *ADAPT)


@pytest.mark.subprocess
def test_backward_on_another_thread(recorded):
    assert Counter(recorded["backward_thread"]) == ranges(*ADAPT)


@pytest.mark.subprocess
def test_compiled_code_has_no_ranges_and_is_not_compiled_anew(recorded):
    assert recorded["compiled"] == []


@pytest.mark.subprocess
def test_switch_in_the_environment(record):
    names = record("-c", "from tests import test_profiling; test_profiling.off()", IDLORA_NVTX="1")
    assert Counter(names[""]) == ranges(*ADAPT)


def test_ranges_change_no_result():
    pytest.importorskip("nvtx")

    def gradients():
        model = adapted()
        model(**inputs()).logits.square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    off = gradients()
    with profiling.nvtx_ranges():
        on = gradients()
    assert off.keys() == on.keys() != set()
    assert all(torch.equal(off[name], on[name]) for name in off)


def test_names_stay_with_copies_and_peft_models():
    from peft import get_peft_model

    def names(model):
        return [m.name for m in model.modules() if isinstance(m, idlora_ext.layer.layer.IdLoraLayer)]

    model = adapted()
    rows = [row.name for row in idlora_ext.summary(model).rows]
    assert names(model) == names(copy.deepcopy(model)) == rows
    assert names(get_peft_model(tiny_llama(), idlora_ext.IdLoraConfig(**FIELDS))) == rows


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(
        ImportError, match=r"nvtx_ranges\(\) needs the package nvtx: pip install 'idlora_ext\[profile\]'"
    ):
        profiling.nvtx_ranges().__enter__()
    monkeypatch.setenv("IDLORA_NVTX", "1")
    with pytest.raises(ImportError, match="IDLORA_NVTX=1 needs the package nvtx"):
        nvtx._from_environment()
    monkeypatch.setenv("IDLORA_NVTX", "0")
    assert nvtx._from_environment() is None
    monkeypatch.setenv("IDLORA_NVTX", "yes")
    with pytest.raises(ValueError, match=r"IDLORA_NVTX must be 1 .*, 0 or unset, got 'yes'"):
        nvtx._from_environment()


# ---- shapes ----------------------------------------------------------------------------------------------------------


def test_captured_shapes(tmp_path):
    model = adapted(shared_router=False).to(torch.bfloat16)
    with profiling.captured_shapes(model) as shapes:
        for _ in range(2):  # the same again is not recorded again
            model(**inputs(batch=2, length=7))
        model(**inputs(batch=1, length=1))
    model(**inputs(batch=3, length=3))
    assert len(shapes) == 2 * 14
    sizes = {"N": 14, "d": 32, "k": 2, "r": 8, "s": 2, "shared_router": False, "static_router": False}
    sizes |= {"bounded": False, "row_scale": False}
    dtypes = dict.fromkeys(("dtype", "router_dtype", "B_dtype"), "bfloat16")
    assert {"layer": "model.layers.1.self_attn.v_proj"} | sizes | dtypes in shapes

    file = tmp_path / "shapes.json"
    file.write_text(json.dumps(shapes))
    replayed = distinct(profile_nsight.captured(file))
    assert {(shape.N, shape.d): n for shape, n in replayed.items()} == {
        (n, d): count for n in (14, 1) for d, count in ((64, 6), (32, 4), (128, 4))
    }
