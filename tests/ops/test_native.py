"""The native module: that it serves, what it hands back to the default kernels, and life without it."""

from __future__ import annotations

import json
import shutil
import sysconfig
from pathlib import Path

import bench_cpu
import pytest
import torch

import idlora_ext
from idlora_ext import native, ops, reference
from idlora_ext.cli import main
from idlora_ext.ops.default_kernels import default_kernels
from idlora_ext.ops.library import SCHEMAS
from idlora_ext.tools import environment
from tests.helpers.commands import python
from tests.helpers.problems import EVERY_ROUTER, FORMS, each, every_form, named, options, tensors_of

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
needs_module = pytest.mark.skipif(native.module is None, reason=f"native module: {native.reason}")


def problem(device="cpu", dtype=torch.float32, leading=(5,), shape=(24, 3, 4, 2), form=FORMS["per-cluster"]):
    torch.manual_seed(0)
    tensors = tensors_of(form, *shape, dtype=dtype, device=device)
    return torch.randn(*leading, shape[0]).to(device, dtype), *tensors, torch.randn(shape[0]).to(device, dtype)


# ---- what it serves --------------------------------------------------------------------------------------------------

VIEWS = {
    "contiguous": lambda t: t,
    "row-strided": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "rows in reverse dimensions": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "transposed": lambda t: t.mT.contiguous().mT,
    "one row, expanded": lambda t: t[:1, :1].expand_as(t),
    "a dimension expanded": lambda t: t[:, :1].expand_as(t),
    "every second column": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "some rows": lambda t: torch.cat([t, t, t], 1)[:, 1 : 1 + t.shape[1]],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_of_the_activation_do_not_matter(view, dtype, device):
    y0, index, router, B, b = problem(device, dtype, (3, 4))
    y0, dy = view(y0), view(torch.randn(3, 4, 24).to(device, dtype))
    y, x = torch.ops.idlora.adapt(y0, index, router, B, b, 0.7, save_x=True)
    expected = torch.ops.idlora.adapt(y0.contiguous(), index, router, B, b, 0.7, save_x=True)
    assert torch.equal(y, expected[0])
    assert torch.equal(x, expected[1])
    gradients = torch.ops.idlora.adapt_backward(dy, x, index, router, B, 0.7)
    expected = torch.ops.idlora.adapt_backward(dy.contiguous(), x, index, router, B, 0.7)
    assert all(map(torch.equal, gradients, expected))
    exact = reference.adapt(y0.double(), index, router.double(), B.double(), b.double(), 0.7)
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=0.05 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_place_whatever_the_strides(view, dtype, device):
    y0, *adapter = problem(device, dtype, (3, 4))
    y0 = VIEWS[view](y0)
    expected, _ = torch.ops.idlora.adapt(y0, *adapter, 0.7)
    if "expanded" in view:
        with pytest.raises(RuntimeError, match=r"copy_|more than one element"):  # torch does not write there
            ops.adapt_(y0, *adapter, 0.7)
        return
    assert ops.adapt_(y0, *adapter, 0.7) is y0
    assert torch.equal(y0, expected)


@each(form=EVERY_ROUTER, dtype=named([torch.float32, torch.bfloat16, torch.float16]))
def test_opcheck_in_the_dtypes_it_serves(dtype, form, device):
    y0, index, router, B, b = problem(device, dtype, (2, 2), form=form)
    y0 = torch.cat([y0, y0], -1)[..., :24]
    given = options(form, index)
    c, bounded, center = given.values()
    kept = torch.ops.idlora.adapt(y0, index, router, B, b, 0.7, **given, save_x=True)[1]
    x, z = y0[..., index.long()], torch.randn(2, 2, 4, device=device)
    for name, args in {
        "cluster_gather": (y0, index, b, c),
        "rb_scale": (x, router.float(), bounded, center),
        "shared_gemm": (y0, z, B.float(), b, 0.7),
        "adapt": (y0, index, router, B, b, 0.7, False, c, bounded, center, True),
        "adapt_": (y0, index, router, B, b, 0.7, False, c, bounded, center),
        "adapt_backward": (y0, kept, index, router, B.float(), 0.7, c, bounded, center),
    }.items():
        torch.library.opcheck(getattr(torch.ops.idlora, name), args)


@needs_module
def test_serves_the_families_and_adapt(device):
    if environment.report()["obstacles"][device] is None:
        for op in ("cluster_gather", "rb_scale", "shared_gemm", "adapt", "adapt_backward"):
            assert environment.report()["kernels"][op][device] == "native"


@needs_module
@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_form_is_served_without_falling_back(form, dtype, device):
    y0, index, router, B, b = problem(device, dtype, form=form)
    given = options(form, index)
    with torch.profiler.profile() as profile:
        _, x = torch.ops.idlora.adapt(y0, index, router, B, b, 0.7, **given, save_x=True)
        torch.ops.idlora.adapt_backward(y0, x, index, router, B, 0.7, **given)
        x = torch.ops.idlora.cluster_gather(y0, index, row_scale=given["row_scale"])
        torch.ops.idlora.rb_scale(x, router, given["bounded"], given["center"])
    fell_back = {event.key for event in profile.key_averages() if event.key.startswith("idlora::default_")}
    served = dtype != torch.float64 and environment.report()["obstacles"][device] is None
    assert fell_back == (
        set()
        if served
        else {f"idlora::default_{op}" for op in ("adapt", "adapt_backward", "cluster_gather", "rb_scale")}
    )


@needs_module
@pytest.mark.parametrize("form", bench_cpu.FORMS)
@pytest.mark.parametrize("N", [1, 64])
def test_the_benchmark_of_the_kernels_verifies_and_runs(form, N):
    case = bench_cpu.Case(form, "SmolLM2-135M", 192, 32, N, torch.bfloat16)
    with torch.inference_mode():
        row = bench_cpu.measure(case, rounds=2)
    assert set(row["errors"]) == set(bench_cpu.OUTPUTS)
    assert all(row[phase]["native"]["median"] > 0 for phase in ("forward", "backward"))


# ---- what it hands back ----------------------------------------------------------------------------------------------


def test_float64_runs_on_the_default_kernel(device):
    args = problem(device, torch.float64)
    y, _ = torch.ops.idlora.adapt(*args, 0.7)
    assert torch.equal(y, default_kernels["adapt"](*args, 0.7)[0])


@needs_module
def test_errors_of_the_default_kernels_come_through_unchanged(device, capfd):
    y0, index, router, B, _ = problem(device)
    for _ in range(2):
        with pytest.raises(TypeError, match="adapt: index must be int32, got int64") as raised:
            ops.adapt(y0, index.long(), router, B)
        assert raised.traceback[-1].path.name == "fakes.py"
        with pytest.raises(ValueError, match=r"rb_scale: router must be \[k, r\]"):
            ops.rb_scale(y0[..., index.long()], router[:, :2])
        with pytest.raises(ValueError, match="adapt: center must be None with a linear router"):
            ops.adapt(y0, index, router, B, center=torch.ones(2, 4, device=device))
        with pytest.raises(ValueError, match=r"rb_scale: center must be \[2, r\] = \[2, 4\]"):
            ops.rb_scale(y0[..., index.long()], router[:, 0], center=torch.ones(2, 3, device=device))
        with pytest.raises(ValueError, match=r"adapt_backward: x must be \[\.\.\., k, r\] = \[5, 3, 4\]"):
            ops.adapt_backward(y0, y0, index, router, B)
    exact = reference.adapt(y0.double(), index, router.double(), B.double())
    torch.testing.assert_close(ops.adapt(y0, index, router, B).double(), exact, rtol=1e-5, atol=1e-5)
    assert capfd.readouterr() == ("", "")


@needs_module
def test_kernel_resources():
    if native.module.build_info()["cuda"] is None:
        assert not hasattr(native.module, "kernel_resources")
    elif torch.cuda.is_available():
        kernels = native.module.kernel_resources()
        assert any("adapt" in kernel["name"] for kernel in kernels)
        assert all(kernel["registers"] > 0 for kernel in kernels)
    else:
        with pytest.raises(RuntimeError, match=r"no CUDA-capable device|driver"):
            native.module.kernel_resources()


# ---- life without it -------------------------------------------------------------------------------------------------

USE = """
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in f"{f}".lower()]  # finds the module of a checkout
import torch, idlora_ext
from idlora_ext import native, ops
y0, index = torch.ones(2, 8), torch.arange(4, dtype=torch.int32).view(2, 2)
assert ops.adapt(y0, index, torch.ones(2, 2), torch.ones(4, 1)).tolist() == [[5.0] * 8] * 2
print(native.reason)
"""


@pytest.mark.subprocess
def test_switched_off():
    done = python("-c", f"{USE}\nfrom idlora_ext.cli import main\nmain(['env'])", IDLORA_NATIVE="0")
    reason, *report = done.stdout.splitlines()
    assert (done.returncode, reason) == (0, "switched off by IDLORA_NATIVE=0"), done.stderr
    assert "idlora" not in done.stderr
    assert any(line.startswith("native module: none") for line in report)
    assert any("CPU: the native module is switched off by IDLORA_NATIVE=0" in line for line in report)
    assert not any(line.split()[1:2] == ["native"] for line in report if line.startswith("  "))


@pytest.fixture
def package_without_module(tmp_path):
    source = Path(idlora_ext.__file__).parent
    shutil.copytree(
        source, tmp_path / "idlora_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__", "not_built.txt")
    )
    return tmp_path


@pytest.mark.subprocess
def test_not_built(package_without_module):
    done = python("-c", USE, cwd=package_without_module, IDLORA_NATIVE=None)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "not built: this copy of idlora_ext has not been through setup.py\n"
    assert done.stderr.count("RuntimeWarning: idlora_ext runs on its default kernels") == 1


@pytest.mark.subprocess
def test_a_module_that_does_not_load_is_one_warning(package_without_module):
    (package_without_module / "idlora_ext" / f"_C{SUFFIX}").write_bytes(b"of another machine")
    done = python("-c", USE, cwd=package_without_module, IDLORA_NATIVE=None)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("not loadable")
    assert done.stderr.count("RuntimeWarning: idlora_ext runs on its default kernels") == 1
    assert "Reinstall" in done.stderr


# ---- idlora env ------------------------------------------------------------------------------------------------------


def test_env(capsys):
    assert main(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == environment.report()
    assert set(report["kernels"]) == {schema.partition("(")[0] for schema in SCHEMAS}
    for device, obstacle in report["obstacles"].items():
        assert (obstacle is None) == any(on[device] == "native" for on in report["kernels"].values())
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert all(op in text for op in report["kernels"])
    assert all(obstacle in text for obstacle in report["obstacles"].values() if obstacle)
