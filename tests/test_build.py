"""setup.py: what it builds, or why not; and that the bindings compile under every torch that is promised."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.subprocess

ROOT = Path(__file__).parent.parent
NOT_BUILT = "idlora_ext/not_built.txt"
IMPORT = """
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in f"{f}".lower()]  # finds the module of a checkout
import idlora_ext.native
print(idlora_ext.native.reason)
"""
EVERYTHING = """
import importlib, pkgutil, idlora_ext
found = list(pkgutil.walk_packages(idlora_ext.__path__, "idlora_ext."))
for module in found:
    importlib.import_module(module.name)
print(idlora_ext.__file__, len(found))
"""
HEADERS = Path.home() / ".cache/idlora_ext/torch-headers"


def run(command, cwd, **variables):
    """Variables set to None are unset."""
    given = {name: value for name, value in (os.environ | variables).items() if value is not None}
    return subprocess.run(command, cwd=cwd, env=given, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path):
    """What a build needs of this checkout: setup.py writes into it."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("idlora_ext", "csrc"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "not_built*")
        )
    return tmp_path


def setup(checkout, **variables):
    return run([sys.executable, "setup.py", "--version"], checkout, **variables)


# ---- plain Python ----------------------------------------------------------------------------------------------------


def test_no_compiler_is_plain_python_with_one_warning_then_and_at_import(checkout):
    done = setup(checkout, CXX="no-such-compiler", IDLORA_CUDA=None)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("idlora_ext is installed without native kernels: there is no C++17 compiler") == 1
    done = run([sys.executable, "-c", IMPORT], checkout, IDLORA_NATIVE=None)
    assert done.returncode == 0, done.stderr
    reason = "not built: there is no C++17 compiler (no-such-compiler); install one (g++), or point CXX at it"
    assert done.stdout == f"{reason}\n"
    assert (
        done.stderr.count(f"RuntimeWarning: idlora_ext runs on its default kernels: the native module is {reason}") == 1
    )
    assert 'pip install "setuptools>=77" pybind11 ninja' in done.stderr


@pytest.mark.parametrize("package", ["torch", "pybind11"])
def test_a_missing_package_is_named(package, checkout):
    (checkout / "without").mkdir()
    (checkout / f"without/{package}.py").write_text(f"raise ImportError('no {package} here')")
    done = setup(checkout, PYTHONPATH=str(checkout / "without"), IDLORA_CUDA="OFF")
    assert done.returncode == 0, done.stderr
    assert (checkout / NOT_BUILT).read_text().startswith(f"no {package} here; install torch, pybind11 and ninja")


def test_a_later_build_takes_the_reason_away(checkout):
    setup(checkout, CXX="no-such-compiler", IDLORA_CUDA="OFF")
    assert (checkout / NOT_BUILT).exists()
    done = setup(checkout, IDLORA_CUDA="OFF")
    assert done.returncode == 0, done.stderr
    assert not (checkout / NOT_BUILT).exists()


def test_a_wheel_has_every_folder(checkout, tmp_path_factory):
    """Installed where nothing else of ours is; what it depends on comes from this environment."""
    folder = tmp_path_factory.mktemp("empty")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    done = run([*command, folder, checkout], folder, CXX="no-such-compiler", IDLORA_CUDA="OFF")
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=False)
    site = next((folder / "venv/lib").glob("python*")) / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join(others))  # their .pth files, editable installs too, are not read
    done = run([folder / "venv/bin/python", "-c", EVERYTHING], folder, IDLORA_NATIVE="0", PYTHONPATH=None)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        str(site / "idlora_ext/__init__.py"),
        str(len(list((ROOT / "idlora_ext").rglob("*.py"))) - 1),
    ]


# ---- CUDA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("toolkit", ["/no/such/toolkit", None], ids=["CUDA_HOME", "PATH"])
def test_no_nvcc(toolkit, checkout):
    without = {"CUDA_HOME": toolkit, "CUDA_PATH": None}
    if toolkit is None:
        if Path("/usr/local/cuda/bin/nvcc").exists():
            pytest.skip("this machine has /usr/local/cuda")
        without["PATH"] = str(checkout)
    done = setup(checkout, IDLORA_CUDA="ON", **without)
    assert done.returncode == 1
    assert "IDLORA_CUDA=ON, but there is no nvcc" in done.stderr
    assert "CUDA_HOME" in done.stderr


def test_cuda_on_without_a_compiler_is_an_error(checkout):
    done = setup(checkout, CXX="no-such-compiler", IDLORA_CUDA="ON", CUDA_HOME="/no/such/toolkit", CUDA_PATH=None)
    assert done.returncode == 1
    assert "IDLORA_CUDA=ON, but" in done.stderr


def test_cuda_switch_is_checked(checkout):
    done = setup(checkout, IDLORA_CUDA="maybe")
    assert done.returncode == 1
    assert "IDLORA_CUDA must be AUTO, ON or OFF, got MAYBE" in done.stderr


@pytest.mark.parametrize(
    ("known", "built"),
    [
        ("75 80 86 90 100 103 110 120 121", "7.5;8.0+PTX;9.0;10.0;12.0+PTX"),
        ("75 80 86 90", "7.5;8.0+PTX;9.0+PTX"),
        ("75 80", "7.5;8.0+PTX"),
    ],
)
def test_nvcc_need_not_be_of_the_cuda_that_torch_has(known, built, checkout):
    """A stand-in for nvcc 11.8, under a torch for CUDA 13, through torch's own check."""
    (checkout / "bin").mkdir()
    nvcc = checkout / "bin/nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'release 11.8, V11.8.89' {' '.join(f'compute_{a}' for a in known.split())}\n")
    nvcc.chmod(0o755)
    code = f"""
import os, runpy, sys, torch
from torch.utils import cpp_extension
torch.version.cuda, cpp_extension.CUDA_HOME = "13.0", {str(checkout)!r}
check = lambda: cpp_extension._check_cuda_version("g++", cpp_extension.TorchVersion("10.2"))
try:
    check()
except RuntimeError as error:
    assert error.args[1:] == ("11.8", "13.0"), error
else:
    raise SystemExit("torch no longer checks")
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py", run_name="__main__")
check()
print(os.environ["TORCH_CUDA_ARCH_LIST"])
"""
    variables = {"IDLORA_CUDA": "ON", "CUDA_HOME": str(checkout), "TORCH_CUDA_ARCH_LIST": None}
    done = run([sys.executable, "-c", code], checkout, **variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == built


# ---- torch -----------------------------------------------------------------------------------------------------------


def headers(version):
    """torch's include folder, out of its smallest wheel: what we include is the same on every platform."""
    folder = HEADERS / version
    if not folder.exists():
        wheels = HEADERS / f"{version}.wheels"
        wanted = ["--platform", "macosx_14_0_arm64", "--python-version", "3.12", "--only-binary", ":all:", "--no-deps"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", *wanted, "--dest", wheels, f"torch=={version}"]
        done = run(command, ROOT, PIP_CONSTRAINT=os.devnull)
        if done.returncode:
            pytest.skip(
                f"the headers of torch {version} are not to be had here: {done.stderr.strip().splitlines()[-1]}"
            )
        with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
            wheel.extractall(wheels, [name for name in wheel.namelist() if name.startswith("torch/include/torch/")])
        (wheels / "torch/include").rename(folder)
        shutil.rmtree(wheels)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("version", ["2.10.0", "2.12.0", "2.15.0"])
def test_the_bindings_compile_under(version, tmp_path):
    pybind11 = pytest.importorskip("pybind11")
    include = [tmp_path, ROOT / "csrc", pybind11.get_include(), headers(version), sysconfig.get_path("include")]
    target = re.search(r'TARGET_TORCH = "(\w+)"', (ROOT / "setup.py").read_text())[1]
    flags = ["-std=c++17", "-fsyntax-only", "-DIDLORA_CUDA", f"-DTORCH_TARGET_VERSION={target}"]
    (tmp_path / "build_info.h").write_text('#define IDLORA_BUILD_INFO "{}"')  # as setup.py would
    sources = sorted((ROOT / "csrc/bindings").glob("*.cpp"))
    done = run(["g++", *flags, *(f"-I{folder}" for folder in include), *sources], tmp_path)
    assert done.returncode == 0, done.stderr
