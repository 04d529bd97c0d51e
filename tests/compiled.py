"""C++ that tests compile, kept in build/tests under names that its text decides.

So a second run compiles nothing, and of several processes that need the same file one compiles it.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
CXX = os.environ.get("CXX", "g++")
# The arithmetic of the build. Without optimization, and with FUSEDOPT_HD, which lets the compiler
# not inline rules, hundreds of kernels compile in seconds and run long enough for a test.
COMMAND = [CXX, "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
COMMAND += [f"-I{ROOT}/csrc", f"-I{ROOT}/tests/cpp"]
NOT_INLINED = "-DFUSEDOPT_HD=inline"


def run(*command: str | Path) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


def kept(key: str, suffix: str, make: Callable[[Path], object]) -> Path:
    """The file of this key, made if there is none."""
    path = ROOT / "build/tests" / (hashlib.sha256(key.encode()).hexdigest()[:16] + suffix)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                part = path.with_suffix(".part")
                make(part)
                part.rename(path)
    return path


@cache
def object_of(source: Path, *flags: str) -> Path:
    """The object of a source, found by what the preprocessor makes of it."""
    command = [*COMMAND, *flags, source]
    text = run(*command, "-E", "-P")
    return kept(f"{CXX} {flags} {text}", ".o", lambda part: run(*command, "-c", "-o", part))


@cache
def linked(suffix: str, *objects: Path, flags: tuple[str, ...] = ("-pthread",)) -> Path:
    """A program or a library."""
    command = [CXX, *flags, *objects]
    return kept(f"{command}", suffix, lambda part: run(*command, "-o", part))
