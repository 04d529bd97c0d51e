"""The docs: their Python runs and their links resolve."""

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
NEEDS = {"huggingface": "transformers", "accelerate": "accelerate", "lightning": "lightning"}
SLOW = {*NEEDS, "distributed"}
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def title(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page):
    """The page's Python blocks, each behind as many empty lines as precede it there."""
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return ["\n" * text.count("\n", 0, match.start(1)) + match[1] for match in found]


EXAMPLES = [
    pytest.param(page, id=title(page), marks=[pytest.mark.slow] if page.stem in SLOW else [])
    for page in PAGES
    if blocks(page)
]


def run(page):
    """Runs the blocks of a page one after the other, as a reader does; returns what they define."""
    names = {"__name__": "__main__"}
    for block in blocks(page):
        exec(compile(block, title(page), "exec"), names)
    return names


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", EXAMPLES)
def test_examples_run(page, tmp_path, monkeypatch):
    if page.stem in NEEDS:
        pytest.importorskip(NEEDS[page.stem])
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, value in ALONE.items():  # as torchrun starts a single process
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    try:
        assert run(page)
    finally:
        torch.set_num_threads(threads)


MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "fusedopt").rglob("*.py"))
    if ">>> " in path.read_text()
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_run(module):
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted
    assert not results.failed


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in slugs, target


def test_every_page_is_listed():
    front = (ROOT / "docs/README.md").read_text()
    for page in PAGES:
        if page.is_relative_to(ROOT / "docs") and page.name != "README.md":
            assert f"({page.relative_to(ROOT / 'docs').as_posix()})" in front, title(page)
