"""What wrappers, copies and proxies of an optimizer are asked for reaches the optimizer."""

import copy
import weakref

import pytest
import torch
from harness import make_params, set_grads

import fusedopt
from fusedopt.optimizer import FusedOptimizer


class Imitating:
    """As Lightning's and Fabric's: its class becomes one that inherits the optimizer's."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Imitating", (type(self), type(optimizer)), {})

    @property
    def optimizer(self):
        return self._optimizer

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


class Stepping(Imitating):
    """As the same, which step by themselves."""

    def step(self, closure=None):
        return self._optimizer.step(closure)


class Copying:
    """As Lightning's of before 2.0, with the attributes that the optimizer has when it is made."""

    def __init__(self, optimizer):
        self.__dict__.update({k: v for k, v in vars(optimizer).items() if k != "step"})
        self._optimizer = optimizer
        self.__class__ = type("Copying", (type(self), type(optimizer)), {})


class Forwarding:
    """As DeepSpeed's and ZeRO's: no relation of the optimizer's class."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __getattr__(self, name):
        return getattr(self.optimizer, name)


def subclass(optimizer):
    """An optimizer of a user's subclass, in the optimizer's place."""
    optimizer.__class__ = type("Mine", (type(optimizer),), {})
    return optimizer


WRAPPERS = {
    "imitating": Imitating,
    "stepping": Stepping,
    "copying": Copying,
    "imitating, twice": lambda optimizer: Imitating(Copying(optimizer)),
    "copy.copy": copy.copy,
    "copy.copy of a wrapper": lambda optimizer: copy.copy(Imitating(optimizer)),
    "subclass": subclass,
    "weakref.proxy": weakref.proxy,
    "forwarding": Forwarding,
}


class Pair:
    """A wrapper of an optimizer, and how what is asked of the one is seen in the other."""

    def __init__(self, wrap, **options):
        self.params = make_params([(3,), (2, 5)])
        self.optimizer = fusedopt.SGD(self.params, lr=0.5, momentum=0.9, **options)
        self.wrapper = wrap(self.optimizer)
        self.start = [p.detach().clone() for p in self.params]

    def set_grads(self, step=0):
        set_grads(self.params, step)
        return self

    @property
    def moved(self):
        return not all(map(torch.equal, self.params, self.start))


def steps(wrap):
    pair = Pair(wrap, ema_decay=0.5).set_grads()
    pair.wrapper.step()
    return pair.moved and len(pair.optimizer.state) == 2


def accumulates(wrap):
    """Two micro-batches, then a step of either of the two."""
    ends = []
    for steps_ in ("optimizer", "wrapper"):
        pair = Pair(wrap)
        for weight in (1, 3):
            pair.set_grads(weight).wrapper.accumulate(weight=weight)
        getattr(pair, steps_).step()
        assert pair.moved
        ends.append(pair.params)
    return all(map(torch.equal, *ends))


def accumulates_by_number(wrap):
    pair = Pair(wrap)
    pair.wrapper.accumulation_steps = 2
    seen = []
    for step in range(2):
        seen.append((pair.wrapper.will_step, pair.optimizer.will_step))
        pair.set_grads(step).wrapper.step()
    return seen == [(False, False), (True, True)] and pair.moved


def option(name, value):
    def is_set(wrap):
        pair = Pair(wrap)
        setattr(pair.wrapper, name, value)
        return getattr(pair.optimizer, name) == getattr(pair.wrapper, name) == value

    return is_set


def measures(wrap):
    pair = Pair(wrap)
    pair.wrapper.max_grad_norm = 1e-3
    pair.set_grads().wrapper.step()
    skipped = pair.wrapper.step_was_skipped
    return pair.wrapper.grad_norm == pair.optimizer.grad_norm > 1 and not skipped


def swaps(wrap):
    pair = Pair(wrap, ema_decay=0.5)
    pair.set_grads().wrapper.step()
    with pair.wrapper.swap_ema():
        for either in (pair.optimizer, pair.wrapper):
            with pytest.raises(RuntimeError, match="leave it before a step"):
                either.step()
    return True


def loads(wrap):
    pair, other = Pair(wrap).set_grads(), Pair(wrap)
    pair.wrapper.step()
    saved = pair.wrapper.state_dict()
    assert saved["state"]
    other.wrapper.load_state_dict(saved)
    other.set_grads().wrapper.step()
    loaded = other.wrapper if wrap is copy.copy else other.optimizer  # torch's shares it no longer
    expected = pair.set_grads().optimizer
    expected.step()
    states = [[s["momentum_buffer"] for s in o.state.values()] for o in (loaded, expected)]
    return all(map(torch.equal, *states))


def adds_a_group(wrap):
    pair = Pair(wrap)
    pair.wrapper.add_param_group({"params": make_params([(4,)])})
    return len(pair.optimizer.param_groups) == 2 and len(pair.wrapper.routes()) == 3


def refreshes(wrap):
    pair = Pair(wrap)
    return pair.wrapper.refresh_hyperparameters() == 0


VALUES = {
    "backend": "cpu",
    "state_dtype": torch.float32,
    "max_grad_norm": 0.25,
    "skip_nonfinite": True,
    "ema_decay": 0.5,
    "zero_grads": True,
    "accumulation_steps": 3,
    "accumulation_reduction": "sum",
    "accumulation_dtype": torch.float32,
    "norm_group": (),
}
SCENARIOS = {
    "step": steps,
    "accumulate": accumulates,
    "will_step": accumulates_by_number,
    **{name: option(name, value) for name, value in VALUES.items()},
    "grad_norm": measures,
    "step_was_skipped": measures,
    "swap_ema": swaps,
    "state_dict": loads,
    "load_state_dict": loads,
    "add_param_group": adds_a_group,
    "routes": adds_a_group,
    "refresh_hyperparameters": refreshes,
}


def public_names():
    """What our classes have and torch's do not, or have otherwise."""
    ours = {n for n in dir(FusedOptimizer) if not n.startswith("_")}
    theirs = torch.optim.Optimizer
    return {n for n in ours if getattr(FusedOptimizer, n) is not getattr(theirs, n, None)}


def test_every_public_name_is_tried():
    assert SCENARIOS.keys() == public_names()


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_wrapper_loses_nothing(name, wrap):
    if wrap is Forwarding and (name in VALUES or SCENARIOS[name] in SETTERS):
        # Nothing tells an attribute of theirs from one of ours: docs/differences.md says so.
        wrap = lambda optimizer: Forwarding(optimizer).optimizer  # noqa: E731
    assert SCENARIOS[name](wrap)


SETTERS = (accumulates_by_number, measures)


@pytest.mark.parametrize("scaler", [torch.amp.GradScaler, fusedopt.GradScaler])
@pytest.mark.parametrize("wrap", [Imitating, Stepping, Copying, copy.copy])
def test_a_scaler_serves_a_wrapper(scaler, wrap):
    ends = []
    for step_of in ("optimizer", "wrapper"):
        pair, scale = Pair(wrap), scaler("cpu", init_scale=4.0)
        wrapper = getattr(pair, step_of)
        scale.scale(sum(p.square().sum() for p in pair.params)).backward()
        scale.step(wrapper)
        scale.update()
        assert pair.moved
        ends.append(pair.params)
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("wrap", [Imitating, Copying, copy.copy, weakref.proxy])
def test_steps_in_the_backward_of_a_wrapper(wrap):
    pair = Pair(wrap)
    with fusedopt.step_in_backward(pair.wrapper):
        sum(p.sum() for p in pair.params).backward()
    assert pair.moved


def test_what_takes_an_optimizer_names_the_one_inside_of_a_wrapper():
    wrapper = Forwarding(fusedopt.SGD(make_params(), lr=0.1))
    for call in (fusedopt.step_in_backward, fusedopt.GradScaler("cpu").accumulate):
        with pytest.raises(TypeError, match=r"is a Forwarding; .* its attribute \.optimizer"):
            call(wrapper)


def test_a_copy_whose_groups_are_replaced_is_on_its_own():
    pair = Pair(copy.copy).set_grads()
    pair.wrapper.param_groups = [{**pair.optimizer.param_groups[0], "params": pair.params[:1]}]
    pair.wrapper.max_grad_norm = 0.5
    pair.wrapper.step()
    assert pair.optimizer.max_grad_norm is None
    assert [torch.equal(p, s) for p, s in zip(pair.params, pair.start, strict=True)] == [0, 1]


def test_a_wrapper_may_outlive_its_optimizer():
    params = make_params([(3,)])

    def make(wrap):
        wrapper = wrap(fusedopt.SGD(params, lr=0.1, max_grad_norm=1.0))
        wrapper.__dict__.pop("_optimizer", None)
        return wrapper

    for wrap in (Copying, copy.copy):
        wrapper = make(wrap)
        wrapper.accumulation_steps = 2
        assert not wrapper.will_step
