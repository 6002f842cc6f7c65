"""Builds ``idlora_ext._C``, the native kernels. Everything else about the package is in pyproject.toml.

The module uses torch's stable ABI and brings its own CUDA runtime, so one binary serves CPU and CUDA builds of torch,
whichever it was built under. Environment:

* ``IDLORA_CUDA``           AUTO (default): CUDA kernels if there is an nvcc; ON: fail without; OFF: CPU kernels only
* ``CUDA_HOME``             the toolkit to use (default: that of the nvcc on PATH, or /usr/local/cuda)
* ``TORCH_CUDA_ARCH_LIST``  such as "8.0;9.0+PTX" (default: every architecture the kernels know)
* ``IDLORA_LINEINFO=1``     line numbers for Nsight Compute
* ``MAX_JOBS``, ``CXX``     as usual

Without torch, pybind11 or a C++ compiler the package is plain Python, and says so where it is imported.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
NOT_BUILT = ROOT / "idlora_ext/not_built.txt"  # why not; idlora_ext/native.py reads it
ARCHITECTURES = ("7.5", "8.0", "9.0", "10.0", "12.0")  # code for 8.0 runs on 8.6 and 8.9, that for 10.0 on 10.3
PORTABLE = "8.0"  # as PTX too, which the driver compiles for whatever else there is, such as 11.0
TARGET_TORCH = "0x020a000000000000"  # the stable ABI of torch 2.10


def cuda_toolkit() -> Path | None:
    """The folder with ``bin/nvcc``, or None: not asked for, or not there."""
    wanted = os.environ.get("IDLORA_CUDA", "AUTO").upper()
    if wanted not in ("AUTO", "ON", "OFF"):
        raise SystemExit(f"idlora_ext: IDLORA_CUDA must be AUTO, ON or OFF, got {wanted}")
    if wanted == "OFF":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    nvcc = nvcc or (None if home else shutil.which("/usr/local/cuda/bin/nvcc"))
    if nvcc:
        # The nvcc on PATH may be a link or a script; it knows where it lives.
        plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        top = re.search(r"^#\$ TOP=(.*)$", plan, re.MULTILINE)
        return Path(top[1].strip() if top else Path(nvcc).parents[1]).resolve()
    if wanted == "ON":
        where = f"in CUDA_HOME={home}" if home else "on PATH or in /usr/local/cuda"
        raise SystemExit(
            f"idlora_ext: IDLORA_CUDA=ON, but there is no nvcc {where}. Install the CUDA toolkit, point CUDA_HOME at "
            "it, or leave IDLORA_CUDA at AUTO to build the CPU kernels alone."
        )
    return None


def compiles(cxx: list[str]) -> bool:
    command = [*cxx, "-x", "c++", "-std=c++17", "-fsyntax-only", "-"]
    return bool(shutil.which(cxx[0])) and not subprocess.run(command, input=b"#include <optional>").returncode


def first_line(command: list[str], pattern: str = ".+") -> str:
    output = subprocess.run(command, capture_output=True, text=True).stdout
    return re.search(pattern, output)[0]


def architectures(toolkit: Path) -> str:
    given = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if given:
        return given
    known = subprocess.run([toolkit / "bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    served = [a for a in ARCHITECTURES if f"compute_{a.replace('.', '')}" in known]
    return ";".join(f"{a}+PTX" if a in (PORTABLE, served[-1]) else a for a in served)


def pure_python(reason: str) -> dict:
    if os.environ.get("IDLORA_CUDA", "").upper() == "ON":
        raise SystemExit(f"idlora_ext: IDLORA_CUDA=ON, but {reason}")
    NOT_BUILT.write_text(reason)
    warnings.warn(f"idlora_ext is installed without native kernels: {reason}", stacklevel=2)
    return {}


def native() -> dict:
    toolkit = cuda_toolkit()
    try:
        import pybind11
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        return pure_python(f"{error}; install torch, pybind11 and ninja, or build without --no-build-isolation")
    cxx = os.environ.get("CXX", "c++").split()
    if not compiles(cxx):
        return pure_python(f"there is no C++17 compiler ({' '.join(cxx)}); install one (g++), or point CXX at it")
    NOT_BUILT.unlink(missing_ok=True)
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])  # ninja

    flags = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TARGET_TORCH}"]
    flags += ["-DIDLORA_CUDA"] if toolkit else []
    nvcc_flags = [f for f in flags if f not in ("-g0", "-fvisibility=hidden")]
    nvcc_flags += ["-Xcompiler=-fvisibility=hidden", "-Xfatbin=-compress-all"]
    nvcc_flags += ["-lineinfo"] if os.environ.get("IDLORA_LINEINFO") == "1" else []
    info = {
        "version": re.search(r'"(.+)"', (ROOT / "idlora_ext/version.py").read_text())[1],
        "torch": torch.__version__,
        "compiler": first_line([*cxx, "--version"]),
        "flags": " ".join(flags),
        "cuda": None,
    }
    sources = sorted(s for folder in ("bindings", "cpu", "rows") for s in ROOT.glob(f"csrc/{folder}/*.cpp"))
    libraries, library_dirs, link = ["c10", "torch_cpu"], cpp_extension.library_paths(), ["-s"]
    include_dirs = [str(ROOT / "csrc"), pybind11.get_include(), *cpp_extension.include_paths()]
    if toolkit:
        cpp_extension.CUDA_HOME = str(toolkit)  # a CPU build of torch leaves it unset
        torch.version.cuda = None  # as there. Otherwise nvcc's CUDA must be torch's, but the module brings its own
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(toolkit)
        info["cuda"] = {
            "nvcc": first_line([toolkit / "bin/nvcc", "--version"], r"release [\d.]+, V[\d.]+"),
            "architectures": os.environ["TORCH_CUDA_ARCH_LIST"],
            "flags": " ".join(nvcc_flags),
            "lineinfo": "-lineinfo" in nvcc_flags,
        }
        sources += sorted(s for folder in ("bindings", "cuda") for s in ROOT.glob(f"csrc/{folder}/*.cu"))
        include_dirs.append(str(toolkit / "include"))
        libraries += ["cudart_static", "rt", "dl", "pthread"]
        library_dirs += [str(p) for p in (toolkit / "lib64", toolkit / "lib") if p.is_dir()]
        # torch's libcudart must not stand in for the one linked here. libtorch leads to libtorch_cuda, if there is one.
        link += ["-Wl,--exclude-libs,libcudart_static.a", "-Wl,--no-as-needed", "-ltorch"]
        link += ["-Wl,--wrap=__cudaRegisterFunction"]  # csrc/bindings/resources.cu

    # Kept between builds, so that only what changed is compiled. A change of what build_info.h says changes its date.
    build = Path("build") / ("cuda" if toolkit else "cpu")

    class Build(cpp_extension.BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            self.build_temp = str(build)  # an editable install would take a temporary folder

    header = ROOT / build / "include/build_info.h"
    text = f'#define IDLORA_BUILD_INFO R"json({json.dumps(info)})json"\n'
    header.parent.mkdir(parents=True, exist_ok=True)
    if not header.exists() or header.read_text() != text:
        header.write_text(text)

    served = "the CPU and CUDA" if toolkit else "the CPU"
    print(f"idlora_ext: native kernels for {served}: {json.dumps(info)}", file=sys.stderr)
    extension = Extension(
        "idlora_ext._C",
        sources=[str(s.relative_to(ROOT)) for s in sources],
        depends=[str(h) for pattern in ("csrc/**/*.h", "csrc/**/*.cuh") for h in ROOT.glob(pattern)] + [str(header)],
        include_dirs=[*include_dirs, str(header.parent)],
        libraries=libraries,
        library_dirs=library_dirs,
        extra_compile_args={"cxx": flags, "nvcc": nvcc_flags},
        extra_link_args=link,
        language="c++",
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


if {"egg_info", "dist_info", "sdist"} & set(sys.argv):  # nothing is built: nothing to say
    setup()
elif platform.system() == "Linux":
    setup(**native())
else:
    setup(**pure_python("the kernels are built on Linux only"))
