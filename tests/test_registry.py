"""The registry: every rule has all its pieces, and nothing else knows a rule by name.

What belongs to a rule is the list in CONTRIBUTING.md, "Add a rule". Whoever adds one reads here, in
a sentence, what is still missing.
"""

import re
import shutil
from pathlib import Path

import cases
import oracle
import pytest
import tolerances
import torch

import fusedopt
from fusedopt import _C

ROOT = Path(__file__).parent.parent
LIST = "csrc/rules/all.h"
# Where the arithmetic lives beside the list; a rule's name belongs there and in tests and docs.
HEADERS_OF_NO_RULE = {"all", "rule"}
SHARED_MODULES = {
    *("__init__", "__main__", "_build_info", "_extension", "amp", "backends", "optimizer"),
    "packing",
}
# What must not know a rule by name, and would have to change with every rule if it did.
NAMELESS = ("csrc/core", "csrc/cpu", "csrc/plan", "csrc/bindings.cpp", "setup.py", "CMakeLists.txt")
NAMELESS_PYTHON = tuple(
    f"fusedopt/{name}.py" for name in sorted(SHARED_MODULES - {"__init__", "_build_info"})
)


def listed_rules(root):
    """Names of the rules in the list, in its order, with their structs."""
    return re.findall(r'RULE\("(\w+)", (\w+)\)', (root / LIST).read_text())


def read(path):
    return path.read_text() if path.is_file() else ""


def without_comments(text):
    """C++ and Python without comments and docstrings, which may give a rule as an example."""
    text = re.sub(r'"""[\s\S]*?"""', "", text)
    return re.sub(r"(//|#(?!include|define|if|el|en|pragma|error|undef)).*", "", text)


def missing_pieces(root):
    """What a rule in the list lacks in the source tree at `root`, a sentence each."""
    found = []
    for rule, struct in listed_rules(root):
        header = read(root / f"csrc/rules/{rule}.h")
        opening = header.partition("#pragma once")[0]
        is_alias = f"using {struct}" in header  # its formula is another rule's
        module = read(root / f"fusedopt/{rule}.py")
        classes = re.findall(rf'^class (\w+)\(.*rule="{rule}"\)', module, re.MULTILINE)
        exported = f"from fusedopt.{rule} import" in read(root / "fusedopt/__init__.py")
        pieces = {
            f"csrc/rules/{rule}.h with a struct {struct}": re.search(
                rf"(struct|using) {struct}\b", header
            ),
            f"its formula and source in the opening comment of csrc/rules/{rule}.h": (
                "Source:" in opening
                and "Variant:" in opening
                and (is_alias or re.search(r"^//   p +=", opening, re.MULTILINE))
            ),
            f'its #include "rules/{rule}.h" in {LIST}': (
                f'#include "rules/{rule}.h"' in read(root / LIST)
            ),
            f'a class with rule="{rule}" in fusedopt/{rule}.py': classes,
            "its class in fusedopt/__init__.py": exported,
            f"a page docs/rules/{rule}.md": read(root / f"docs/rules/{rule}.md"),
            "its page in the table of docs/README.md": (
                f"(rules/{rule}.md)" in read(root / "docs/README.md")
            ),
            "a row in tests/cases.py": f'Case("{rule}"'
            in re.sub(r"Case\(\s+", "Case(", read(root / "tests/cases.py")),
        }
        found += [
            f"The rule {rule!r} lacks {piece}." for piece, there in pieces.items() if not there
        ]
    return found


def strays(root):
    """Files of a rule that is not in the list, and names of rules where none belong."""
    rules = [rule for rule, _ in listed_rules(root)]
    found = []
    for folder, suffix, others in (
        ("csrc/rules", ".h", HEADERS_OF_NO_RULE),
        ("fusedopt", ".py", SHARED_MODULES),
        ("docs/rules", ".md", set()),
    ):
        for path in sorted((root / folder).glob(f"*{suffix}")):
            if path.stem not in {*rules, *others}:
                found.append(f"{folder}/{path.name} belongs to no rule in {LIST}.")
    names = re.compile(rf"\b({'|'.join([*rules, *(s for _, s in listed_rules(root))])})\b", re.I)
    for place in (*NAMELESS, *NAMELESS_PYTHON):
        path = root / place
        for file in sorted(path.rglob("*.*")) if path.is_dir() else [path]:
            named = names.search(without_comments(file.read_text()))
            if named:
                found.append(f"{file.relative_to(root)} names the rule {named.group()}.")
    return found


def test_every_rule_is_complete():
    assert listed_rules(ROOT)
    assert missing_pieces(ROOT) == []


def test_nothing_else_knows_a_rule_by_name():
    assert strays(ROOT) == []


def test_the_build_has_the_list():
    rules = [rule for rule, _ in listed_rules(ROOT)]
    assert list(_C.rules()) == rules
    assert sorted(case.name for case in cases.CASES) == sorted(rules)
    assert set(oracle.RULES) == set(tolerances.PARAM_ULPS) == set(tolerances.STATE_ULPS)
    assert set(oracle.RULES) == {case.rule for case in cases.CASES}


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_names_are_torchs(case):
    rule = _C.rules()[case.name]
    defaults = case.torch_class([torch.nn.Parameter(torch.ones(1))]).defaults
    assert set(rule["hyper"]) <= {*defaults, "decoupled_weight_decay"}
    assert {name for names in rule["states"] for name in names} == set(case.states)
    assert rule["has_step"] == case.has_step
    assert case.fused_class in fusedopt.__all__
    assert issubclass(case.fused(), case.torch_class)


PLACES = ("csrc", "fusedopt", "docs", "tests", "setup.py", "CMakeLists.txt")


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources to break."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.png")
    for place in PLACES:
        if (ROOT / place).is_dir():
            shutil.copytree(ROOT / place, tmp_path / place, ignore=ignore)
        else:
            shutil.copy(ROOT / place, tmp_path / place)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "old", "new", "sentence"),
    [
        ("csrc/rules/sgd.h", "struct Sgd ", "struct Sga ", "csrc/rules/sgd.h with a struct Sgd"),
        ("csrc/rules/adam.h", "// Source:", "// Origin:", "opening comment of csrc/rules/adam.h"),
        (LIST, '#include "rules/adagrad.h"', "", '#include "rules/adagrad.h"'),
        ("fusedopt/rmsprop.py", 'rule="rmsprop"', "", 'rule="rmsprop" in fusedopt/rmsprop.py'),
        ("fusedopt/__init__.py", "from fusedopt.adamw", "#", "its class in fusedopt/__init__.py"),
        ("docs/README.md", "(rules/adam.md)", "", "its page in the table of docs/README.md"),
        ("tests/cases.py", '"sgd"', '"sgd2"', "a row in tests/cases.py"),
    ],
)
def test_a_missing_piece_is_named(tree, path, old, new, sentence):
    text = (tree / path).read_text()
    assert old in text
    (tree / path).write_text(text.replace(old, new))
    (complaint,) = missing_pieces(tree)
    assert sentence in complaint


@pytest.mark.parametrize("path", ["csrc/rules/sgd.h", "fusedopt/adagrad.py", "docs/rules/adamw.md"])
def test_a_missing_file_is_named(tree, path):
    (tree / path).unlink()
    assert any(path in complaint for complaint in missing_pieces(tree))


@pytest.mark.parametrize(
    ("path", "text", "sentence"),
    [
        ("csrc/rules/lion.h", "", "csrc/rules/lion.h belongs to no rule"),
        ("fusedopt/lion.py", "", "fusedopt/lion.py belongs to no rule"),
        ("docs/rules/lion.md", "", "docs/rules/lion.md belongs to no rule"),
        ("csrc/cpu/driver.cpp", "void AdamW();", "csrc/cpu/driver.cpp names the rule AdamW"),
        ("fusedopt/packing.py", "RULE = 'sgd'", "fusedopt/packing.py names the rule sgd"),
    ],
)
def test_a_stray_is_named(tree, path, text, sentence):
    (tree / path).write_text(text)
    (complaint,) = strays(tree)
    assert sentence in complaint
