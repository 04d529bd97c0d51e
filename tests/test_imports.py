"""The package's modules import each other in one direction, wherever they do so."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def modules(root):
    """Names of the package's modules, with their files."""
    files = [*root.glob("fusedopt/*.py"), *root.glob("fusedopt/data/*.py")]
    files += root.glob("triton_kernels/*.py")
    found = {}
    for file in files:
        parts = file.relative_to(root).with_suffix("").parts
        parts = ("fusedopt", *parts) if parts[0] == "triton_kernels" else parts
        found[".".join(part for part in parts if part != "__init__")] = file
    return found


def imported(name, file, known):
    """The modules that one imports: in functions and for annotations alone, too."""
    package = name if file.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = package.split(".")[: len(package.split(".")) + 1 - node.level]
            origin = ".".join([*(here if node.level else []), *filter(None, [node.module])])
            members = [f"{origin}.{alias.name}" for alias in node.names]
            # The compiled extension imports nothing of ours.
            found = [m if m in known or m == "fusedopt._C" else origin for m in members]
        else:
            continue
        yield from (module for module in found if module in known and module != name)


def circle(root):
    """Modules that import each other, in order; none if all imports go in one direction."""
    known = modules(root)
    graph = {name: set(imported(name, file, known)) for name, file in known.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_imports_have_one_direction():
    assert circle(ROOT) == []


@pytest.mark.parametrize(
    "closing",
    [
        "from fusedopt.c import f",
        "from fusedopt import c",
        "def g():\n    import fusedopt.c",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .c import f",
    ],
)
def test_a_circle_is_found(tmp_path, closing):
    (tmp_path / "fusedopt").mkdir()
    sources = {
        "__init__": "from fusedopt.c import f",
        "a": closing,
        "b": "from fusedopt.a import x",
    }
    sources["c"] = "import torch\nfrom fusedopt import _C, b\nf = 1"
    for name, source in sources.items():
        (tmp_path / f"fusedopt/{name}.py").write_text(source)
    assert {*circle(tmp_path)} == {"fusedopt.a", "fusedopt.b", "fusedopt.c"}
    (tmp_path / "fusedopt/a.py").write_text("x = 1")
    assert circle(tmp_path) == []
