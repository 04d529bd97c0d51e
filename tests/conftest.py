"""Fixtures that several suites share."""

import pytest
import rehearsal
from devices import Cuda, Rehearsed, needs_gpu

from fusedopt import backends


@pytest.fixture(params=[Rehearsed, pytest.param(Cuda, marks=needs_gpu)], ids=lambda p: p.name)
def place(request, monkeypatch):
    """Where a device's kernels run."""
    monkeypatch.setitem(backends.BACKENDS, "rehearsal", rehearsal.BACKEND)
    return request.param
