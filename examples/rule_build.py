"""Builds the rule as if its files lay in the checkout: a copy of it, with them, in build/.

The list of rules holds this one alone, so that the driver and its instruction tiers compile in
seconds; in a checkout of one's own it is a line more.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "examples/custom_rule"
RULE, STRUCT = "heavy_ball", "HeavyBall"

CXX = os.environ.get("CXX", "g++")
# The arithmetic flags of setup.py, which decide the bits; less optimization, which does not.
FLAGS = "-std=c++20 -O1 -fopenmp -fPIC -fno-math-errno -fno-trapping-math -ffp-contract=off"
FLAGS += " -fvisibility=hidden"


def make_tree() -> Path:
    """The folder with the copy; its name is that of its contents."""
    text = hashlib.sha256(FLAGS.encode())
    places = [ROOT / "csrc/core", ROOT / "csrc/cpu", ROOT / "csrc/rules", ROOT / "triton_kernels"]
    for path in sorted(path for place in [*places, HERE] for path in place.rglob("*.*")):
        if path.suffix in {".h", ".cpp", ".py"}:
            text.update(path.read_bytes())
    tree = ROOT / f"build/custom_rule/{text.hexdigest()[:16]}"
    if not tree.exists():
        part = tree.with_suffix(f".{os.getpid()}")
        for folder in ("csrc", "triton_kernels"):
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / folder, part / folder, ignore=ignore)
            shutil.copytree(HERE / folder, part / folder, ignore=ignore, dirs_exist_ok=True)
        rules = part / "csrc/rules/all.h"
        entry = f'#include "rules/{RULE}.h"\n#define FUSEDOPT_FOR_EACH_RULE(RULE) '
        entry += f'RULE("{RULE}", {STRUCT})\n'
        listed = re.sub(r"#ifndef FUSEDOPT_FOR_EACH_RULE[\s\S]*", entry, rules.read_text())
        rules.write_text(listed)
        try:
            part.rename(tree)
        except OSError:  # another process was faster
            shutil.rmtree(part)
    return tree


def library(tree: Path) -> ctypes.CDLL:
    """The CPU driver with the rule in it, compiled where it has not been."""
    built = tree / "driver.so"
    if not built.exists():
        sources = [*(tree / "csrc/core").glob("*.cpp"), *(tree / "csrc/cpu").glob("*.cpp")]
        sources.append(HERE / "step.cpp")
        objects = [tree / f"{source.stem}.{os.getpid()}.o" for source in sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            pairs = zip(sources, objects, strict=True)
            list(pool.map(lambda pair: _run(tree, "-c", pair[0], "-o", pair[1]), pairs))
        part = tree / f"driver.{os.getpid()}.so"
        _run(tree, "-shared", *objects, "-o", part)
        part.rename(built)
        for path in objects:
            path.unlink()
    loaded = ctypes.CDLL(str(built))
    loaded.step.restype = None
    loaded.step.argtypes = [
        ctypes.c_char_p,
        ctypes.POINTER(ctypes.c_double),
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.c_int64,
    ]
    return loaded


def _run(tree: Path, *arguments: str | Path) -> None:
    if shutil.which(CXX) is None:
        sys.exit(f"custom_rule needs a C++20 compiler and has no {CXX!r}: install g++ or set CXX")
    command = [CXX, *FLAGS.split(), "-I", tree / "csrc", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}")


def twin(tree: Path) -> tuple[ModuleType, ModuleType]:
    """The twin's module and that of the kernels, for Triton's interpreter.

    Triton decides at import whether a function is compiled or interpreted, so the copy is imported
    under a name of its own.
    """
    import triton

    name, folder = f"kernels_with_{RULE}", tree / "triton_kernels"
    if name not in sys.modules:
        spec = spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules[name] = module_from_spec(spec)
        asked = triton.knobs.runtime.interpret
        triton.knobs.runtime.interpret = True
        try:
            spec.loader.exec_module(sys.modules[name])
            import_module(f"{name}.{RULE}")
            import_module(f"{name}.multi_tensor")
        finally:
            triton.knobs.runtime.interpret = asked
    return sys.modules[f"{name}.{RULE}"], sys.modules[f"{name}.multi_tensor"]
