"""``benchmarks/profile_nsight.py``: its replay, its limits, and the reader of what ncu writes."""

from __future__ import annotations

import re
import sys
from collections import Counter

import profile_nsight
import pytest
import torch
from harness import limits
from profile_nsight import Shape, read_ncu, table

from idlora_ext import ops
from tests.helpers.problems import FORMS, options, tensors_of


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


@pytest.mark.subprocess
def test_replay_of_a_model(record):
    names = record(profile_nsight.__file__, "--model", "smollm2-135m", "--tokens", "5", "--iterations", "2")
    layers = {(0, "self_attn.q_proj", 576, 128), (0, "self_attn.k_proj", 192, 48), (0, "mlp.gate_proj", 1536, 128)}
    shapes = [
        Shape(f"model.layers.{i}.{name}", 5, d, 4, r, 2, True, "bfloat16", "float32", "float32", True, False, True)
        for i, name, d, r in layers
    ]
    assert Counter(names[""]) == Counter(
        {
            f"{shape} | {phase} | idlora::{op}": 2
            for shape in shapes
            for phase, op in (("forward", "adapt"), ("backward", "adapt_backward"))
        }
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
