"""Fixtures that several suites share."""

import pytest
import torch
from devices import Cuda, Host, Interpreted, Rehearsed, TritonOnCuda, needs

from fusedopt import backends

ON_A_GPU = [pytest.param(p, marks=needs(p.backend)) for p in (Cuda, TritonOnCuda)]
PLACES = [Rehearsed, Interpreted, *ON_A_GPU]


@pytest.fixture(params=PLACES, ids=lambda place: place.name)
def place(request, monkeypatch):
    """Where a device's kernels run."""
    return prepared(request.param, monkeypatch)


@pytest.fixture(params=[Host, *PLACES], ids=lambda place: place.name)
def anywhere(request, monkeypatch):
    """Where any kernels run: those of the CPU too."""
    return prepared(request.param, monkeypatch)


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


def pytest_collection_modifyitems(items):
    """Leaves to the long run what the interpreter, slow as it is, shows in fewer cases as well."""
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        interpreted = Interpreted in params.values()
        grouped = "whatever_the_number_of_groups" in item.name and "sgd" not in item.name
        if interpreted and (grouped or params.get("dtype") in (torch.float64, torch.float16)):
            item.add_marker(pytest.mark.slow)
