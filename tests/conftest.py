"""Fixtures that several suites share."""

from collections import Counter

import pytest
import torch
from devices import ANYWHERE, PLACES, Interpreted

from fusedopt import backends

TOOLS = ("test_bench", "test_docs", "test_examples", "test_gpu_check")
GPU_ROWS = pytest.StashKey[tuple[int, Counter[str]]]()


@pytest.fixture(params=PLACES)
def place(request, monkeypatch):
    """Where a device's kernels run."""
    return prepared(request.param, monkeypatch)


@pytest.fixture(params=ANYWHERE)
def anywhere(request, monkeypatch):
    """Where any kernels run: those of the CPU too."""
    return prepared(request.param, monkeypatch)


@pytest.fixture(scope="session")
def four_ranks():
    """Processes of torch.distributed, started by the first test that needs them."""
    from ranks import Ranks

    started = Ranks()
    yield started
    started.stop()


def prepared(place, monkeypatch):
    """The place, with its row in the table of backends."""
    monkeypatch.setitem(backends.BACKENDS, place.backend, place.row)
    if place is Interpreted:
        monkeypatch.setattr("triton.runtime.interpreter.TensorHandle.set_attr", check_hint)
    return place


def check_hint(handle, key, value):
    """What kernels promise of an address must hold, which the interpreter itself does not mind."""
    assert key == "tt.divisibility"
    assert (handle.data % value[0] == 0).all()


def pytest_configure(config):
    if hasattr(config, "workerinput"):  # one of several processes
        torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        # What a module's tests share is made in one of the processes of pytest-xdist only.
        fixtures = item._fixtureinfo.name2fixturedefs.values()
        module = item.nodeid.partition("::")[0]
        if any(f.scope != "function" and f.baseid == module for f, *_ in fixtures):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
        if item.path.stem.startswith(TOOLS):
            item.add_marker(pytest.mark.tools)
    missing = {item: [m.args[0] for m in item.iter_markers("gpu")] for item in items}
    left_out = [item for item in items if any(missing[item])]
    config.stash[GPU_ROWS] = (
        sum(bool(reasons) and not any(reasons) for reasons in missing.values()),
        Counter(next(filter(None, missing[item])) for item in left_out),
    )
    items[:] = [item for item in items if not any(missing[item])]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture
def gpu_rows(pytestconfig):
    """How many tests on a GPU were collected, and how many were left out, by what is missing."""
    return pytestconfig.stash[GPU_ROWS]
