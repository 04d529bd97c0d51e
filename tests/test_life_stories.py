"""Random life stories of an optimizer beside torch.optim, and faults that they must find."""

import logging
from types import SimpleNamespace

import pytest
import rehearsal
from hypothesis import Phase
from stories import Story, StoryOnADevice, live

from fusedopt.packing import Packed


@pytest.fixture(autouse=True)
def quiet(caplog):
    """Every sparse gradient of every story would be logged."""
    caplog.set_level(logging.ERROR, logger="fusedopt")


@pytest.fixture
def on_a_device(monkeypatch):
    monkeypatch.setattr("fusedopt.planned_steps.backend_for", lambda device: rehearsal.BACKEND)


@pytest.mark.parametrize("stories", [60, pytest.param(1500, marks=pytest.mark.slow)])
def test_a_life_beside_torch(stories):
    live(Story, stories)


@pytest.mark.parametrize("stories", [40, pytest.param(800, marks=pytest.mark.slow)])
def test_a_life_on_a_device_beside_torch(on_a_device, stories):
    live(StoryOnADevice, stories)


# ---- Faults that the stories must find -----------------------------------------------------------


class Stale(Packed):
    """A plan that misses what changed since it was built, as far as Python can make it."""

    def __init__(self, rule, groups, state, *others):
        super().__init__(rule, groups, state, *others)
        params = [param for group in groups for param in group["params"]]
        self.then = {
            "state": {param: dict(entries) for param, entries in state.items()},
            "groups": [{**g, "params": list(g["params"])} for g in groups],
            "storage": {param: param.data for param in params},
            "gradient": {param: param.grad for param in params},
        }
        self.true, self.plan = self.plan, SimpleNamespace(step=self.take)


class MissesReplacedStates(Stale):
    def take(self, groups, state, request=None):
        return self.true.step(groups, self.then["state"], request)


class MissesChangedGroups(Stale):
    def take(self, groups, state, request=None):
        return self.true.step(self.then["groups"], state, request)


class MissesMovedParameters(Stale):
    def take(self, groups, state, request=None):
        now = {param: param.data for param in self.then["storage"]}
        for param, data in self.then["storage"].items():
            if param.data.dtype == data.dtype:
                param.data = data
        try:
            return self.true.step(groups, state, request)
        finally:
            for param, data in now.items():
                param.data = data


class MissesReplacedGradients(Stale):
    def take(self, groups, state, request=None):
        now = {param: param.grad for param in self.then["gradient"]}
        for param, grad in self.then["gradient"].items():
            if None not in (param.grad, grad) and grad.dtype == param.dtype:
                param.grad = grad
        try:
            return self.true.step(groups, state, request)
        finally:
            for param, grad in now.items():
                param.grad = grad


@pytest.mark.parametrize("fault", Stale.__subclasses__(), ids=lambda fault: fault.__name__)
def test_a_plan_that_misses_a_change_is_found(monkeypatch, fault):
    """By the stories of the quick run; without looking for the shortest."""
    monkeypatch.setattr("fusedopt.planned_steps.Packed", fault)
    with pytest.raises(AssertionError):
        live(Story, 60, phases=[Phase.generate])
