"""Builds the C++ extension `fusedopt._C` and maps the packages; pyproject.toml has the metadata.

The extension is compiled against the torch of the interpreter that runs this file and imports only
under that torch. So torch is not a build requirement: an isolated build would download the newest
one, and the result would not load beside the user's.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

REMEDY = "pip install torch, then pip install --no-build-isolation ."
try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    sys.exit(f"fusedopt is built against the torch it will run with and found none: {REMEDY}")

import setuptools
from torch.utils import cpp_extension

TORCH, SETUPTOOLS = str(torch.__version__), setuptools.__version__
if tuple(map(int, re.findall(r"\d+", TORCH)[:2])) < (2, 11):
    sys.exit(f"fusedopt needs torch 2.11 or newer and found {TORCH}: pip install -U torch")
if int(SETUPTOOLS.split(".")[0]) < 77:
    sys.exit(f"fusedopt needs setuptools 77 or newer, not {SETUPTOOLS}: pip install -U setuptools")

ROOT = Path(__file__).resolve().parent
# Import name to folder. Mapped, so that no `bench` or `triton_kernels` (an import name of Triton's
# own distribution) lands at the top of site-packages.
FOLDERS = {"fusedopt": "fusedopt"}
FOLDERS |= {f"fusedopt.{folder}": folder for folder in ("bench", "triton_kernels")}
# No -march: one build serves every machine, the tier files name their instruction sets themselves.
# No contraction to fma: the rules' roundings are a contract. -fopenmp: without it at::parallel_for
# runs serially, silently. -g0 undoes Python's own -g, which makes the file ten times as large.
COMPILE_FLAGS = (
    "-O3 -std=c++20 -fopenmp -fno-math-errno -fno-trapping-math -ffp-contract=off "
    "-fvisibility=hidden -Wall -g0"
).split()
BUILD_INFO = '''"""Written by setup.py: what the extension beside this file was built with."""

TORCH_VERSION = {torch}
COMPILER = {compiler}
CUDA_TOOLKIT = {toolkit}  # of the CUDA kernels; empty: there are none,
CUDA_MISSING = {missing}  # because
CUDA_ARCHITECTURES = {architectures}
'''
# What is built without TORCH_CUDA_ARCH_LIST: Ampere, Hopper and both kinds of Blackwell, as far as
# the toolkit knows them, and PTX of the last for what comes after it.
ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")
# No contraction to fma here either; quotients and roots are correctly rounded by default.
NVCC_FLAGS = "-O3 -std=c++20 -fmad=false".split()


def tell(*command: str) -> str:
    """What a command prints, "" if there is no such program."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout + done.stderr


class Cuda:
    """Whether the CUDA kernels are built, with which toolkit and for which architectures."""

    def __init__(self) -> None:
        self.home = self._home()
        self.nvcc = str(Path(self.home or "/", "bin", "nvcc"))
        release = re.search(r"release (\d+)\.(\d+)", tell(self.nvcc, "--version"))
        self.toolkit = ".".join(release.groups()) if release else ""
        self.missing = self._missing()
        wanted = os.environ.get("FUSEDOPT_CUDA", "")
        if wanted not in ("", "0", "1"):
            sys.exit(
                f"FUSEDOPT_CUDA={wanted!r} must be 0 (never), 1 (or fail) or unset (if it can)"
            )
        # A torch without CUDA can hold the kernels, though not run them: the build can be tried.
        if wanted == "1" and self.missing and not (self.toolkit and not torch.version.cuda):
            sys.exit(f"FUSEDOPT_CUDA=1, but the CUDA kernels cannot be built: {self.missing}")
        if wanted == "0":
            self.missing = "it was built with FUSEDOPT_CUDA=0"
        elif wanted == "1":
            self.missing = ""
        self.architectures = "" if self.missing else self._architectures()

    def _home(self) -> str:
        """CUDA_HOME, or the toolkit of the nvcc on PATH, or torch's finding."""
        if named := os.environ.get("CUDA_HOME"):
            return named
        if found := shutil.which("nvcc"):
            # The program on PATH may be a script that calls the real one, which knows where it is,
            # while torch takes the script's folder for the toolkit's.
            top = re.search(r"TOP=(\S+)", tell(found, "--dryrun", "-c", "x.cu"))
            return str(Path(top.group(1) if top else found.rpartition("/bin/")[0]).resolve())
        return cpp_extension.CUDA_HOME or ""

    def _runtime(self) -> Path | None:
        """The runtime library, of the toolkit or, where that has none to link with, torch's."""
        wheels = Path(torch.__file__).parent.parent / "nvidia"
        folders = [
            Path(self.home, folder) for folder in ("lib64", "lib", "targets/x86_64-linux/lib")
        ]
        for folder in [*folders, *sorted(wheels.glob("*/lib"))]:
            if found := sorted(folder.glob(f"libcudart.so.{self.toolkit.split('.')[0]}*")):
                return found[0]
        return None

    def _missing(self) -> str:
        if not torch.version.cuda:
            return f"torch {TORCH} has no CUDA"
        if not self.toolkit:
            return "there is no nvcc; install CUDA's toolkit or set CUDA_HOME"
        if self.toolkit.split(".")[0] != torch.version.cuda.split(".")[0]:
            return f"nvcc is of CUDA {self.toolkit}, torch of CUDA {torch.version.cuda}"
        if self._runtime() is None:
            return f"there is no libcudart.so in {self.home} nor beside torch; set CUDA_HOME"
        return ""

    def _architectures(self) -> str:
        """What torch makes of TORCH_CUDA_ARCH_LIST, in the spelling of its default here."""
        known = tell(self.nvcc, "--list-gpu-code").split()
        built = [a for a in ARCHITECTURES if f"sm_{a.replace('.', '')}" in known]
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", " ".join(built) + "+PTX")
        flags = " ".join(cpp_extension._get_cuda_arch_flags())
        codes: dict[str, str] = {}
        for kind, major, minor in re.findall(r"code=(sm|compute)_(\d+)(\d[af]?)", flags):
            codes[f"{major}.{minor}"] = "+PTX" if kind == "compute" else ""
        return " ".join(code + ptx for code, ptx in codes.items())

    def extension_arguments(self) -> dict[str, list]:
        """What the extension needs beside the CPU part."""
        if self.missing:
            return {}
        cpp_extension.CUDA_HOME = self.home  # which torch leaves unset where it has no CUDA
        # torch's own runtime library, which is loaded before the extension, has this name, too.
        runtime = self._runtime() if torch.version.cuda else None
        return {
            "define_macros": [("FUSEDOPT_WITH_CUDA", None)],
            "libraries": [f":{runtime.name}"] if runtime else ["cudart_static", "rt", "dl"],
            "library_dirs": [str(runtime.parent)]
            if runtime
            else [str(Path(self.home, folder)) for folder in ("lib64", "lib")],
        }


class BuildExtension(cpp_extension.BuildExtension):
    """torch's ninja build, which also records in _build_info.py what it built with."""

    def run(self) -> None:
        """Builds the extension and writes _build_info.py beside it."""
        cxx = cpp_extension.get_cxx_compiler()
        compiler = tell(*cxx.split(), "--version").partition("\n")[0]
        if not compiler:
            sys.exit(f"fusedopt needs a C++20 compiler and has no `{cxx}`: install g++ or set CXX")
        kernels = (
            f"CUDA kernels for {cuda.architectures} with CUDA {cuda.toolkit}"
            if not cuda.missing
            else f"no CUDA kernels, because {cuda.missing}"
        )
        print(f"fusedopt: building the CPU part with {compiler} for torch {TORCH}, and {kernels}")
        # An editable install would compile in a temporary folder, and so everything, every time.
        tag = f"{self.plat_name}-{sys.implementation.cache_tag}-torch-{TORCH}"
        self.build_temp = str(ROOT / "build" / f"temp.{tag}")
        super().run()
        quoted = {
            "torch": json.dumps(TORCH),
            "compiler": json.dumps(compiler),
            "toolkit": json.dumps("" if cuda.missing else cuda.toolkit),
            "missing": json.dumps(cuda.missing),
            "architectures": json.dumps(cuda.architectures),
        }
        for path in self.info_paths():
            path.write_text(BUILD_INFO.format(**quoted), encoding="utf-8")

    def info_paths(self) -> list[Path]:
        """_build_info.py in the build folder and, when building in place, in the source tree."""
        folders = [Path(self.build_lib), ROOT] if self.inplace else [Path(self.build_lib)]
        return [folder / "fusedopt" / "_build_info.py" for folder in folders]

    def get_output_mapping(self) -> dict[str, str]:
        """Tells a strict editable install, which links every output to its source, of the file."""
        paths = [str(path) for path in self.info_paths()]
        return super().get_output_mapping() | dict(pairwise(paths))


def csrc(pattern: str) -> list[str]:
    """The files of csrc/ that match, relative to this folder as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob(pattern))


def units() -> list[str]:
    """The C++ files that are compiled: all but those that csrc/torch_unit.cpp includes."""
    text = (ROOT / "csrc" / "torch_unit.cpp").read_text()
    included = {f"csrc/{name}" for name in re.findall(r'#include "(.+\.cpp)"', text)}
    return [path for path in csrc("*.cpp") if path not in included]


# ninja and python share a folder, on PATH only where the virtual environment is activated.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
include_dirs = [str(ROOT / "csrc")]  # absolute: ninja runs in its own folder
if not any(Path(folder, "pybind11").is_dir() for folder in cpp_extension.include_paths()):
    import pybind11  # some builds of torch leave it to the system; torch's own copy comes first

    include_dirs.append(pybind11.get_include())

cuda = Cuda()
extra = cuda.extension_arguments()
extension = cpp_extension.CppExtension(
    "fusedopt._C",
    units() + (csrc("*.cu") if extra else []),
    depends=csrc("*.h") + csrc("*.cuh") + csrc("*.cpp"),
    include_dirs=include_dirs,
    extra_compile_args={"cxx": COMPILE_FLAGS, "nvcc": NVCC_FLAGS},
    extra_link_args=["-fopenmp"],
    **extra,
)
packages = [*FOLDERS]
for root, folder in FOLDERS.items():
    packages += [f"{root}.{sub}" for sub in setuptools.find_packages(folder)]
setuptools.setup(
    packages=packages,
    package_dir=FOLDERS,
    package_data={"fusedopt": ["py.typed", "*.pyi"], "fusedopt.bench": ["*.c", "*.jinja"]},
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension},
)
