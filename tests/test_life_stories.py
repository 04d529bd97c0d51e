"""Random life stories of an optimizer beside torch.optim, and faults that they must find."""

import logging

import pytest
import rehearsal
from hypothesis import Phase
from stories import Story, StoryOnADevice, live

from fusedopt import _C
from fusedopt.packing import Packed


@pytest.fixture(autouse=True)
def quiet(caplog):
    """Every sparse gradient of every story would be logged."""
    caplog.set_level(logging.ERROR, logger="fusedopt")


@pytest.fixture
def on_a_device(monkeypatch):
    monkeypatch.setattr("fusedopt.optimizer.backend_for", lambda device: rehearsal.BACKEND)


@pytest.mark.parametrize("stories", [60, pytest.param(1500, marks=pytest.mark.slow)])
def test_a_life_beside_torch(stories):
    live(Story, stories)


@pytest.mark.parametrize("stories", [40, pytest.param(800, marks=pytest.mark.slow)])
def test_a_life_on_a_device_beside_torch(on_a_device, stories):
    live(StoryOnADevice, stories)


# ---- Faults that the stories must find -----------------------------------------------------------


class Stale(Packed):
    """A plan that misses what changed since it was built, as far as Python can make it."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        params = [param for group in optimizer.param_groups for param in group["params"]]
        self.then = {
            "state": {param: dict(state) for param, state in optimizer.state.items()},
            "groups": [{**g, "params": list(g["params"])} for g in optimizer.param_groups],
            "storage": {param: param.data for param in params},
            "gradient": {param: param.grad for param in params},
        }


class MissesReplacedStates(Stale):
    def refresh(self, purpose=_C.Purpose.UPDATE):
        return self.plan.refresh(self.optimizer.param_groups, self.then["state"])


class MissesChangedGroups(Stale):
    def refresh(self, purpose=_C.Purpose.UPDATE):
        return self.plan.refresh(self.then["groups"], self.optimizer.state)


class MissesMovedParameters(Stale):
    def refresh(self, purpose=_C.Purpose.UPDATE):
        now = {param: param.data for param in self.then["storage"]}
        for param, data in self.then["storage"].items():
            if param.data.dtype == data.dtype:
                param.data = data
        try:
            return super().refresh(purpose)
        finally:
            for param, data in now.items():
                param.data = data


class MissesReplacedGradients(Stale):
    def refresh(self, purpose=_C.Purpose.UPDATE):
        now = {param: param.grad for param in self.then["gradient"]}
        for param, grad in self.then["gradient"].items():
            if None not in (param.grad, grad) and grad.dtype == param.dtype:
                param.grad = grad
        try:
            return super().refresh(purpose)
        finally:
            for param, grad in now.items():
                param.grad = grad


@pytest.mark.parametrize("fault", Stale.__subclasses__(), ids=lambda fault: fault.__name__)
def test_a_plan_that_misses_a_change_is_found(monkeypatch, fault):
    """By the stories of the quick run; without looking for the shortest."""
    monkeypatch.setattr("fusedopt.optimizer.Packed", fault)
    with pytest.raises(AssertionError):
        live(Story, 60, phases=[Phase.generate])
