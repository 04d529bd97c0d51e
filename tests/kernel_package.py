"""The package of Triton's kernels once more, interpreted or changed, beside the one that is used.

Triton decides when it decorates a function whether that will be compiled or interpreted, and
compiles its source text. So another way to have it is another import, under another name.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parent.parent / "triton_kernels"


def load(name: str, folder: Path = FOLDER, *, interpret: bool = False) -> ModuleType:
    """Imports the package in `folder` as `name`; returns its `launcher` module."""
    import triton

    spec = spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[name] = module_from_spec(spec)
    asked = triton.knobs.runtime.interpret
    triton.knobs.runtime.interpret = interpret
    try:
        spec.loader.exec_module(sys.modules[name])
        launcher = import_module(f"{name}.launcher")
        launcher.rules()  # and so everything else
    finally:
        triton.knobs.runtime.interpret = asked
    return launcher


@cache
def interpreted() -> ModuleType:
    """The `launcher` of the kernels in Triton's interpreter."""
    return load("interpreted_triton_kernels", interpret=True)


@cache
def compiled() -> ModuleType:
    """The `launcher` of the kernels to compile, whatever the environment asks for."""
    return load("compiled_triton_kernels")


def changed(folder: Path, file: str, old: str, new: str) -> ModuleType:
    """The `launcher` of a copy in `folder` with a text in a file replaced."""
    for path in FOLDER.glob("*.py"):
        text = path.read_text()
        if path.name == file:
            assert old in text, f"{file} has no {old!r}"
            text = text.replace(old, new)
        (folder / path.name).write_text(text)
    return load(f"changed_triton_kernels_{abs(hash(folder))}", folder)
