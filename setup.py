"""Builds the C++ extension `fusedopt._C` and maps the packages; pyproject.toml has the metadata.

The extension is compiled against the torch of the interpreter that runs this file and imports only
under that torch. So torch is not a build requirement: an isolated build would download the newest
one, and the result would not load beside the user's.
"""

from __future__ import annotations

import json
import os
import re
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
CUDA: str | None = None  # the toolkit of the CUDA kernels, which this version does not have
'''


class BuildExtension(cpp_extension.BuildExtension):
    """torch's ninja build, which also records in _build_info.py what it built with."""

    def run(self) -> None:
        """Builds the extension and writes _build_info.py beside it."""
        cxx = cpp_extension.get_cxx_compiler()
        try:
            told = subprocess.run([*cxx.split(), "--version"], capture_output=True, text=True)
        except OSError:
            sys.exit(f"fusedopt needs a C++20 compiler and has no `{cxx}`: install g++ or set CXX")
        compiler = told.stdout.partition("\n")[0]
        print(
            f"fusedopt: building the CPU part for torch {TORCH} with {compiler}; "
            "CUDA kernels are not part of this version"
        )
        # An editable install would compile in a temporary folder, and so everything, every time.
        tag = f"{self.plat_name}-{sys.implementation.cache_tag}-torch-{TORCH}"
        self.build_temp = str(ROOT / "build" / f"temp.{tag}")
        super().run()
        quoted = {"torch": json.dumps(TORCH), "compiler": json.dumps(compiler)}
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


# ninja and python share a folder, on PATH only where the virtual environment is activated.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
include_dirs = [str(ROOT / "csrc")]  # absolute: ninja runs in its own folder
if not any(Path(folder, "pybind11").is_dir() for folder in cpp_extension.include_paths()):
    import pybind11  # some builds of torch leave it to the system; torch's own copy comes first

    include_dirs.append(pybind11.get_include())

extension = cpp_extension.CppExtension(
    "fusedopt._C",
    csrc("*.cpp"),
    depends=csrc("*.h"),
    include_dirs=include_dirs,
    extra_compile_args=COMPILE_FLAGS,
    extra_link_args=["-fopenmp"],
)
packages = [*FOLDERS]
for root, folder in FOLDERS.items():
    packages += [f"{root}.{sub}" for sub in setuptools.find_packages(folder)]
setuptools.setup(
    packages=packages,
    package_dir=FOLDERS,
    package_data={"fusedopt": ["py.typed", "*.pyi"]},
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension},
)
