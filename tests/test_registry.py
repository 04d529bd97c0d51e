"""The registry: every rule has all its pieces, and nothing else knows a rule by name.

What belongs to a rule is the list in CONTRIBUTING.md, "Add a rule". Whoever adds one reads here, in
a sentence, what is still missing.
"""

import ast
import functools
import re
import shutil
from pathlib import Path

import cases
import pytest
import torch

from fusedopt import _C

ROOT = Path(__file__).parent.parent
LIST = "csrc/rules/all.h"
CASES = "tests/cases.py"
SHARED = {  # modules of no rule
    *(
        "amp",
        "backends",
        "backward_parts",
        "data_parallel",
        "distributed",
        "docstrings",
        "framework_checks",
        "functional",
        "grad_scaler",
        "in_backward",
        "loading",
    ),
    *(
        "step_extras",
        "optimizer",
        "packing",
        "routing",
        "options_mixin",
        "accumulation",
        "planned_steps",
        "wrappers",
    ),
}
SHARED_KERNELS = {"launcher", "layout", "math", "multi_tensor", "norm"}
# What must not know a rule by name, and would have to change with every rule if it did: all sources
# in these places but a rule's own, whatever folder is added.
NAMELESS = ("csrc", "triton_kernels", "fusedopt", "setup.py", "CMakeLists.txt")
NAMELESS_BUT = ("csrc/rules/", "fusedopt/__init__.py")
# What may take an optimizer's class as an example, but must not decide by the name of a rule: all
# but the rows, this test, and what breaks or compiles some rules' own files.
TOOLS = ("tests", "bench", "examples")
TOOLS_BUT = (
    CASES,
    *(f"tests/test_{n}" for n in ("registry", "mutations", "triton", "cuda_static")),
)


def listed_rules(root):
    """Names of the rules in the list, in its order, with their structs."""
    return re.findall(r'RULE\("(\w+)", (\w+)\)', (root / LIST).read_text())


def read(path):
    return path.read_text() if path.is_file() else ""


@functools.cache
def code(text, suffix):
    """A source without its comments and docstrings, which may give a rule as an example."""
    if suffix in {".py", ".pyi"}:
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = None
        return ast.unparse(tree)
    if suffix == ".txt":  # CMake
        return re.sub("#.*", "", text)
    # Strings are kept, and what looks like a comment inside them.
    return re.sub(r'("(?:\\.|[^"\\\n])*")|//.*|/\*[\s\S]*?\*/', r"\1", text)


@functools.cache
def table_keys(text, table):
    """Keys of the dict, or elements of the list, that a module's source builds under this name."""
    found = set()
    for node in ast.parse(text).body:
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            if isinstance(target, ast.Name) and target.id == table:
                entries = getattr(node.value, "keys", None) or getattr(node.value, "elts", [])
                found |= {entry.value for entry in entries}
            elif isinstance(target, ast.Subscript) and ast.unparse(target.value) == table:
                found.add(target.slice.value)
    return found


@functools.cache
def case_rows(text):
    """Names of the rows of tests/cases.py."""
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    return [call.args[0].value for call in calls if ast.unparse(call.func) == "Case"]


@functools.cache
def fields(text, struct):
    """Names of the fields of a struct in a rule's header or of a class in its twin, in order."""
    if f"class {struct}(" in text:
        (found,) = (n for n in ast.parse(text).body if getattr(n, "name", "") == struct)
        return [node.target.id for node in found.body if isinstance(node, ast.AnnAssign)]
    body = re.search(rf"struct {struct} {{(.*?)}};", code(text, ".h"), re.DOTALL)
    return re.findall(r"(\w+)\s*[,;]", body.group(1)) if body else []


def missing_pieces(root):
    """What a rule in the list lacks in the source tree at `root`, a sentence each."""
    found = []
    rows = case_rows(read(root / CASES))
    package, pages = read(root / "fusedopt/__init__.py"), read(root / "docs/README.md")
    exported = table_keys(package, "__all__")
    for rule, struct in listed_rules(root):
        header = read(root / f"csrc/rules/{rule}.h")
        declared = re.search(rf"(struct|using) {struct}\b", header)
        opening = header.partition("#pragma once")[0]
        # An alias's formula is another rule's; a missing header is one complaint, not three.
        formula = not header or f"using {struct}" in header or re.search("(?m)^//   p +=", opening)
        dated = r"Source: [\s\S]*?\b(19|20)\d\d\b[\s\S]*Variant:"
        sourced = not header or re.search(dated, opening)
        module = read(root / f"fusedopt/{rule}.py")
        twin = read(root / f"triton_kernels/{rule}.py")
        alike = [fields(header, s) == fields(twin, s) for s in ("Hyper", "Scalars")]
        classes = re.findall(rf'^class (\w+)\(.*rule="{rule}"\)', module, re.MULTILINE)
        pieces = {
            f"csrc/rules/{rule}.h with a struct {struct}": declared,
            f"its formula in the opening comment of csrc/rules/{rule}.h": formula,
            f"its dated source and variant in the opening comment of csrc/rules/{rule}.h": sourced,
            f'its #include "rules/{rule}.h" in {LIST}': f'"rules/{rule}.h"' in read(root / LIST),
            f"its twin triton_kernels/{rule}.py": twin,
            f"the header's names in triton_kernels/{rule}.py": not twin or not header or all(alike),
            f'a class with rule="{rule}" in fusedopt/{rule}.py': classes,
            "its class in fusedopt/__init__.py": f"from fusedopt.{rule} import" in package,
            "its class in __all__ of fusedopt/__init__.py": {*classes} <= exported,
            f"a page docs/rules/{rule}.md": read(root / f"docs/rules/{rule}.md"),
            "its page in the table of docs/README.md": f"(rules/{rule}.md)" in pages,
            f"a row in {CASES}": rule in rows,
        }
        found += [f"The rule {rule!r} lacks {piece}." for piece, has in pieces.items() if not has]
    return found


def strays(root):
    """Files and entries of a rule that is not in the list, and names of rules where none belong."""
    listed = listed_rules(root)
    rules = [rule for rule, _ in listed]
    found = []
    places = {"csrc/rules/*": {"all", "rule"}, "fusedopt/*.py": SHARED, "docs/rules/*": set()}
    places["triton_kernels/*.py"] = SHARED_KERNELS
    for pattern, others in places.items():
        for path in sorted(root.glob(pattern)):
            if path.stem not in {*rules, *others} and not path.stem.startswith("_"):
                found.append(f"{path.relative_to(root)} belongs to no rule in {LIST}.")
    rows = case_rows(read(root / CASES))
    pages = re.findall(r"\(rules/(\w+)\.md\)", read(root / "docs/README.md"))
    for path, table, has in [(CASES, "rows", rows), ("docs/README.md", "table", pages)]:
        for name in sorted(set(has) - set(rules)):
            found.append(f"{path} has {name!r} in its {table}, of no rule in {LIST}.")
    # A word ends at an underscore too: sgd_step names a rule, and so does FUSED_ADAM.
    names = "|".join(sorted({name for pair in listed for name in pair}))
    pattern = re.compile(rf"(?<![a-z])({names})(?![a-z])", re.IGNORECASE)
    own = [f"{place}/{rule}.py" for rule in rules for place in ("fusedopt", "triton_kernels")]
    own = (*NAMELESS_BUT, *own)
    for place in map(root.joinpath, NAMELESS):
        for file in sorted(place.rglob("*.*")) if place.is_dir() else [place]:
            path = file.relative_to(root).as_posix()
            if file.suffix not in {".so", ".pyc"} and not path.startswith(own):
                named = pattern.findall(code(file.read_text(), file.suffix))
                found += [f"{path} names the rule {name}." for name in named[:1]]
    for file in sorted(file for place in TOOLS for file in (root / place).rglob("*.py")):
        path = file.relative_to(root).as_posix()
        constants = {
            n.value for n in ast.walk(ast.parse(read(file))) if isinstance(n, ast.Constant)
        }
        if not path.startswith(TOOLS_BUT):
            found += [f"{path} names the rule {name}." for name in rules if name in constants]
    return found


def test_every_rule_is_complete_and_built():
    assert missing_pieces(ROOT) == []
    assert list(_C.rules()) == [rule for rule, _ in listed_rules(ROOT)]
    assert case_rows(read(ROOT / CASES)) == [case.name for case in cases.CASES]


def test_nothing_else_knows_a_rule_by_name():
    assert strays(ROOT) == []


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_names_are_torchs(case):
    rule = _C.rules()[case.name]
    defaults = case.torch_class([torch.nn.Parameter(torch.ones(1))]).defaults
    assert set(rule["hyper"]) <= set(defaults)
    assert [*dict.fromkeys(rule["hyper"])] == [key for key in case.defaults if key != "maximize"]
    assert {name for names in rule["states"] for name in names} == set(case.states)
    for sample in case.samples:
        group = {**defaults, **sample.kwargs}
        assert _C.state_names(case.name, group) == case.state_names(case.hyper(group))
    assert ("step" in rule["scalar_states"]) == case.has_step
    assert issubclass(case.fused(), case.torch_class)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources to break."""
    root = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("__pycache__", "cpp", "test_*", "*.so", "*.png")
    for place in (*NAMELESS, *TOOLS, "docs"):
        copy = functools.partial(shutil.copytree, ignore=ignore)
        (copy if (ROOT / place).is_dir() else shutil.copy)(ROOT / place, root / place)
    return root


@pytest.fixture
def write(tree):
    """Writes a file of the copy, or with no text deletes it, for one test."""
    before = {}

    def put(path, text):
        before.setdefault(path, read(tree / path))
        (tree / path).parent.mkdir(exist_ok=True)
        (tree / path).write_text(text) if text else (tree / path).unlink()

    yield put
    for path, text in [*before.items()]:
        put(path, text)


@pytest.mark.parametrize(
    ("path", "old", "new", "sentence"),
    [
        ("csrc/rules/sgd.h", "struct Sgd ", "struct Sga ", "csrc/rules/sgd.h with a struct Sgd"),
        ("csrc/rules/sgd.h", "", "", "lacks csrc/rules/sgd.h"),
        ("triton_kernels/adamw.py", "", "", "lacks its twin triton_kernels/adamw.py"),
        (
            "triton_kernels/sgd.py",
            "    dampening:",
            "    damp:",
            "header's names in triton_kernels",
        ),
        ("csrc/rules/adam.h", "T eps;", "", "header's names in triton_kernels/adam.py"),
        ("docs/rules/adamw.md", "", "", "lacks a page docs/rules/adamw.md"),
        ("csrc/rules/sgd.h", "//   p =", "//   q =", "its formula in the opening comment of"),
        ("csrc/rules/sgd.h", "ICML 2013", "ICML", "its dated source and variant in the opening"),
        (LIST, '#include "rules/adagrad.h"', "", '#include "rules/adagrad.h"'),
        ("fusedopt/rmsprop.py", 'rule="rmsprop"', "", 'rule="rmsprop" in fusedopt/rmsprop.py'),
        ("fusedopt/__init__.py", "from fusedopt.adamw", "#", "its class in fusedopt/__init__.py"),
        ("fusedopt/__init__.py", '    "RMSprop",', "", "in __all__ of fusedopt/__init__.py"),
        ("docs/README.md", "(rules/adam.md)", "", "its page in the table of docs/README.md"),
        (CASES, '    "sgd",', '    "sgd2",', f"'sgd' lacks a row in {CASES}"),
    ],
)
def test_a_missing_piece_is_named(tree, write, path, old, new, sentence):
    assert old in read(tree / path)
    write(path, read(tree / path).replace(old, new) if old else "")
    (complaint,) = missing_pieces(tree)
    assert sentence in complaint


def test_all_that_an_unlisted_rule_has_is_named(tree, write):
    write(LIST, read(tree / LIST).replace('RULE("sgd", Sgd)', ""))
    complaints = "\n".join(strays(tree))
    own = ("csrc/rules/sgd.h", "fusedopt/sgd.py", "triton_kernels/sgd.py", "docs/rules/sgd.md")
    for path in own:
        assert f"{path} belongs to no rule" in complaints
    for entry in (f"{CASES} has 'sgd'", "docs/README.md has 'sgd'"):
        assert entry in complaints


@pytest.mark.parametrize(
    ("path", "text", "sentence"),
    [
        ("csrc/rules/lion.h", "x", "csrc/rules/lion.h belongs to no rule in csrc/rules/all.h"),
        ("fusedopt/lion.py", "x", "fusedopt/lion.py belongs to no rule in csrc/rules/all.h"),
        ("docs/rules/lion.md", "x", "docs/rules/lion.md belongs to no rule in csrc/rules/all.h"),
        ("csrc/cpu/driver.cpp", "void AdamW_step();", "csrc/cpu/driver.cpp names the rule AdamW"),
        ("csrc/core/table.h", '"http://" ADAM', "csrc/core/table.h names the rule ADAM"),
        ("csrc/gpu/driver.cu", "adamw();", "csrc/gpu/driver.cu names the rule adamw"),
        ("fusedopt/amp.py", "x = 5 // 2 or 'sgd'", "fusedopt/amp.py names the rule sgd"),
        ("tests/harness.py", "case.name == 'sgd'", "tests/harness.py names the rule sgd"),
        ("bench/peers.py", "SETTINGS = {'adamw': 1}", "bench/peers.py names the rule adamw"),
        ("examples/race.py", "fusedopt.SGD('sgdm')", None),
        ("CMakeLists.txt", "add(adam)  # or sgd", "CMakeLists.txt names the rule adam"),
        ("csrc/cpu/driver.cpp", "// as AdamW\n/* or\n sgd */ int adamant;", None),
        ("fusedopt/amp.py", '"""As AdamW."""\n\nx = 1  # or sgd', None),
    ],
)
def test_a_stray_is_named(tree, write, path, text, sentence):
    write(path, text)
    assert strays(tree) == ([f"{sentence}."] if sentence else [])
