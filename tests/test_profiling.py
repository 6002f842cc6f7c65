"""NVTX ranges as a profiler receives them, the shapes of a run, the limits, and the reader of what ncu writes."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import profile_nsight
import pytest
import torch
from conftest import FIELDS, FORMS, inputs, options, tensors_of, tiny_llama
from harness import limits
from profile_nsight import Shape, distinct, read_ncu, table

import idlora_ext
from idlora_ext import ops, profiling
from idlora_ext.ops import nvtx

TESTS = Path(__file__).parent
BENCHMARK = TESTS.parent / "benchmarks" / "profile_nsight.py"
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")

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
def record(tmp_path_factory):
    """Runs Python as under a profiler; returns the ranges' names in the order they opened, by scenario."""
    pytest.importorskip("nvtx")
    if COMPILER is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler, to build a library that NVTX loads in the place of a profiler")
    folder = tmp_path_factory.mktemp("nvtx")
    library, file = folder / "nvtx_injection.so", folder / "record"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", library, TESTS / "nvtx_injection.c"], check=True)

    def run(*arguments: str, **environment: str) -> dict[str, list[str]]:
        file.write_text("")
        path = os.pathsep.join(map(str, (TESTS, BENCHMARK.parent, TESTS.parent)))
        nvtx = {"NVTX_INJECTION64_PATH": str(library), "NVTX_RECORD": str(file), "PYTHONPATH": path}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, env=os.environ | nvtx | environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        scenario, names, depth = "", {"": []}, Counter()
        for line in file.read_text().splitlines():
            kind, thread, domain, *message = line.split(" ", 3)
            if domain == "scenario":
                scenario = message[0] if message else ""
                names.setdefault(scenario, [])
            elif domain == nvtx.DOMAIN:
                depth[thread] += 1 if kind == "push" else -1
                assert depth[thread] in (0, 1), f"{scenario}: ranges are nested, or popped twice: {line}"
                names[scenario] += message
        assert not +depth, "a range was never closed"
        return names

    return run


@pytest.fixture(scope="session")
def recorded(record):
    return record("-c", "import test_profiling; test_profiling.run_scenarios()", IDLORA_NVTX="")


def ranges(*phases_and_ops: tuple[str, str]) -> Counter:
    layers = [row.name for row in idlora_ext.summary(adapted()).rows]
    assert len(layers) == 14
    assert "model.layers.1.self_attn.q_proj" in layers
    return Counter(f"{layer} | {phase} | idlora::{op}" for layer in layers for phase, op in phases_and_ops)


ADAPT = (("forward", "adapt"), ("backward", "adapt_backward"))


def test_no_ranges_by_default(recorded):
    assert recorded["off"] == []
    assert recorded[""] == [], "something lies between the scenarios"


def test_ranges_name_layer_phase_and_op(recorded):
    assert Counter(recorded["on"]) == ranges(*ADAPT)
    forward, backward = recorded["on"][:14], recorded["on"][14:]
    assert forward[0] == "model.layers.0.self_attn.q_proj | forward | idlora::adapt"
    assert forward[-1] == "model.layers.1.mlp.down_proj | forward | idlora::adapt"
    assert backward[0] == "model.layers.1.mlp.down_proj | backward | idlora::adapt_backward"


def test_ranges_of_the_single_ops(recorded):
    single = ("cluster_gather", "rb_scale", "shared_gemm")
    both = [*(("forward", op) for op in single), *(("backward", f"{op}_backward") for op in single)]
    assert Counter(recorded["single_ops"]) == ranges(*both)


def test_checkpointed_blocks_run_outside_backward_ranges(recorded):
    """Recomputation starts when saved tensors are asked for. (That no ranges are nested the recorder has checked.)"""
    assert Counter(recorded["checkpointed"]) == ranges(("forward", "adapt"), *ADAPT)


def test_backward_on_another_thread(recorded):
    assert Counter(recorded["backward_thread"]) == ranges(*ADAPT)


def test_compiled_code_has_no_ranges_and_is_not_compiled_anew(recorded):
    assert recorded["compiled"] == []


def test_switch_in_the_environment(record):
    names = record("-c", "import test_profiling; test_profiling.off()", IDLORA_NVTX="1")
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


def test_shapes_survive_in_the_names_of_ranges():
    for form in FORMS.values():
        options = [form.get(name, False) for name in ("static", "bounded", "scaled")]
        shared = form.get("shared", False)
        shape = Shape("model.layers.0.q_proj", 37, 1032, 4, 24, 2, shared, "bfloat16", "float32", "float16", *options)
        assert Shape.parse(str(shape)) == shape
        assert not set(str(shape)) & set('@,[]/*+|":'), "ncu's filters and its CSV give these a meaning"


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_limits_count_every_tensor_once(form):
    """Against the tensors that the ops really take and return."""
    N, d, k, r, s = 37, 1032, 4, 24, 2
    for dtype, narrow in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32)):
        index, router, B = tensors_of(form, d, k, r, s, dtype=narrow)
        given = options(form, index)
        y0 = torch.randn(N, d).to(dtype)
        y, x = torch.ops.idlora.adapt(y0, index, router, B, None, 1.0, **given, save_x=True)
        gradients = ops.adapt_backward(y, x, index, router, B, **given)

        def moved(*tensors):
            return sum(t.nbytes for t in tensors)

        sizes = (N, d, k, r, s, dtype.itemsize, narrow.itemsize, narrow.itemsize)
        names = {"shared_router": "shared", "static_router": "static", "bounded": "bounded", "row_scale": "scaled"}
        said = {name: form.get(short, False) for name, short in names.items()}
        read = [t for t in (index, router, B, given["row_scale"]) if t is not None]
        forward = limits.forward_limit(*sizes, training=True, **said)
        assert forward == moved(y0, y, x, *read)
        assert limits.forward_limit(*sizes, training=False, **said) == moved(y0, y, *read)
        assert limits.backward_limit(*sizes, **said) == moved(y, x, *read, *gradients)


# ---- benchmarks/profile_nsight.py ------------------------------------------------------------------------------------


def test_replay_of_a_model(record):
    names = record(str(BENCHMARK), "--model", "smollm2-135m", "--tokens", "5", "--iterations", "2")
    layers = {(0, "self_attn.q_proj", 576, 128), (0, "self_attn.k_proj", 192, 48), (0, "mlp.gate_proj", 1536, 128)}
    shapes = [
        Shape(f"model.layers.{i}.{name}", 5, d, 4, r, 2, True, "bfloat16", "float32", "float32", True, False, True)
        for i, name, d, r in layers
    ]
    assert Counter(names[""]) == Counter(
        {f"{shape} | {phase} | idlora::{op}": 2 for shape in shapes for phase, op in ADAPT}
    )


def test_printed_commands_parse(capsys, monkeypatch):
    """Every option of the script in a printed command is one it has; the filter matches the ranges it is meant for."""
    options = ["--model", "llama-3.2-3b", "--tokens", "512", "--layers", "q_proj|up proj"]
    monkeypatch.setattr(sys, "argv", ["profile_nsight.py", *options, "--print-commands"])
    profile_nsight.main()
    text = capsys.readouterr().out
    assert text.count("'q_proj|up proj'") == 3
    name = "model.layers.0.q_proj N=1 | forward | idlora::adapt"
    every, forward = re.findall(r"--nvtx-include 'regex:idlora@(.+)/'", text)
    assert re.fullmatch(every, name)
    assert re.fullmatch(forward, name)
    assert not re.fullmatch(forward, name.replace("forward", "backward"))
    assert set(re.findall(r"dram__\w+\.sum|gpu__\w+\.sum", text)) == set(profile_nsight.METRICS)


SHAPE = Shape("model.layers.0.self_attn.q_proj", 4096, 4096, 4, 128, 2, True, "bfloat16", "float32", "float32")
# Made by hand, not by ncu, after the layout of its raw page (Nsight Compute CLI, "Output Pages" and "NVTX Filtering"):
# log lines, a header, a line of units, a line for each kernel; thousands are separated in some locales.
NCU = f"""\
==PROF== Connected to process 4242 (/usr/bin/python3.11)
==PROF== Profiling "adapt_kernel": 0%....50%....100% - 3 passes
"ID","Process ID","Process Name","Host Name","thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg","Id:Domain:Start/Stop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC","dram__bytes_read.sum","dram__bytes_write.sum","gpu__time_duration.sum"
"","","","","","","","","","","","","","Mbyte","byte","us"
"0","4242","python3.11","host","4242  ""<default domain>:step:none:none:none:none:none:none""  ""idlora:{SHAPE} | forward | idlora::adapt:none:none:ARGB:0xff008000:registered:1"" ","","void adapt_kernel<__nv_bfloat16, 4, 2>(AdaptProblem)","1","7","(256, 1, 1)","(128, 1, 1)","0","9.0","34.1","37,000,000","40.0"
"1","4242","python3.11","host","4242  ""idlora:{SHAPE} | forward | idlora::adapt:none:none:ARGB:0xff008000:registered:1"" ","","void adapt_kernel<__nv_bfloat16, 4, 2>(AdaptProblem)","1","7","(256, 1, 1)","(128, 1, 1)","0","9.0","34.3","37,400,000","44.0"
"2","4242","python3.11","host","4299  ""idlora:{SHAPE} | backward | idlora::adapt_backward:none:none:ARGB:0xff0000ff:registered:2"" ","","adapt_backward_kernel(BackwardProblem)","1","7","(256, 1, 1)","(128, 1, 1)","0","9.0","70","33,000,000","60"
"3","4242","python3.11","host","4299  ""idlora:{SHAPE} | backward | idlora::adapt_backward:none:none:ARGB:0xff0000ff:registered:2"" ","","reduce_kernel(float*)","1","7","(256, 1, 1)","(16, 1, 1)","0","9.0","2","500,000","4"
"4","4242","python3.11","host","4299  ""idlora:{SHAPE} | backward | idlora::adapt_backward:none:none:ARGB:0xff0000ff:registered:2"" ","","reduce_kernel(float*)","1","7","(256, 1, 1)","(16, 1, 1)","0","9.0","2","500,000","4"
"5","4242","python3.11","host","","","vectorized_elementwise_kernel(int)","1","7","(128, 1, 1)","(1, 1, 1)","0","9.0","900","0","900"
==PROF== Disconnected from process 4242
"""


def test_ncu_csv_to_costs():
    costs = read_ncu(NCU.splitlines())
    assert list(costs) == [(SHAPE, "forward", "idlora::adapt"), (SHAPE, "backward", "idlora::adapt_backward")]
    forward, backward = costs.values()
    assert forward.kernels == {"adapt_kernel": 2}
    assert (forward.read, forward.written, forward.seconds) == pytest.approx((68.4e6, 74.4e6, 84e-6))
    assert backward.kernels == {"adapt_backward_kernel": 1, "reduce_kernel": 2}
    assert (backward.read, backward.written, backward.seconds) == pytest.approx((74e6, 34e6, 68e-6))


def test_table_of_bytes_against_the_limit(tmp_path, capsys, monkeypatch):
    file = tmp_path / "ncu.csv"
    file.write_text("\n".join(line for line in NCU.splitlines() if "backward" not in line))
    monkeypatch.setattr(sys, "argv", ["profile_nsight.py", "--parse", str(file), "--iterations", "2"])
    profile_nsight.main()
    header, line = capsys.readouterr().out.splitlines()
    # 4096 tokens: y0 and y of 4096, x of 512, two bytes each; B [2048, 64] and T [1, 128] of four; index [4, 128]
    limit = 4096 * (4096 + 4096 + 512) * 2 + (2048 * 64 + 128) * 4 + 512 * 4
    assert dict(zip(re.split("  +", header), re.split("  +", line), strict=True)) == {
        "layer": SHAPE.layer,
        "N": "4096",
        "d": "4096",
        "phase": "forward",
        "read MB": "34.200",
        "written MB": "37.200",
        "limit MB": f"{limit / 1e6:.3f}",
        "ratio": f"{71.4e6 / limit:.3f}",
        "us": "42.0",
        "GB/s": "1700",
        "kernels": "adapt_kernel",
    }


def test_table_names_kernels_launched_several_times():
    costs = {key: cost for key, cost in read_ncu(NCU.splitlines()).items() if key[1] == "backward"}
    assert table(costs, 1).endswith("adapt_backward_kernel, 2 x reduce_kernel")
    with pytest.raises(SystemExit, match=r"'adapt_backward_kernel': 1.* in 2 iterations"):
        table(costs, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: "==PROF== No kernels were profiled.\n", "no kernels in the file"),
        (lambda t: t.replace("Push/Pop_Range", "?"), "need ncu --nvtx --csv --page raw"),
        (lambda t: t.replace("dram__bytes_read.sum", "Metric Name"), "need ncu --nvtx --csv --page raw"),
        (lambda t: t.replace('"Mbyte"', '"sector"'), "dram__bytes_read.sum: unknown unit 'sector'"),
        (lambda t: t.replace("idlora:model", "other:model"), "no kernel ran in a range of the domain idlora"),
        (lambda t: t.replace(" N=4096", ""), "holds no sizes"),
    ],
    ids=["nothing", "no-nvtx", "another-page", "unit", "no-ranges", "not-a-replay"],
)
def test_what_the_reader_refuses(change, words):
    with pytest.raises(SystemExit, match=words):
        read_ncu(change(NCU).splitlines())
