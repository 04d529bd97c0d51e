"""Properties that hold for every model and every life of an optimizer, looked for by hypothesis.

First, lists of parameters of any shape around the edges of vectors and chunks, in any dtypes, split
into groups, with gradients that come and go: whatever the grouping, the tier and the threads, the
bits are those of each parameter stepped alone, and each step is within the oracle's bound. Second,
long sequences of what programs do to an optimizer between steps, beside torch.optim.
"""

import copy
import io
import pickle

import pytest
import torch
from cases import CASES
from harness import DTYPES, assert_same, checked_step, clone_params, set_grads, states_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import fusedopt

CHUNK = 64 * 1024  # kCpuChunkElements
LANES = (2, 4, 8, 16, 32)  # doubles of a generic vector up to two vectors of AVX-512 floats
# A vector or a chunk more or less one, nothing, a scalar, and dimensions of one or no element.
EDGES = sorted({0, 1} | {lanes + near for lanes in LANES for near in (-1, 0, 1)})
SHAPES = [(), *((edge,) for edge in EDGES), (3, 5), (1, 7, 1), (0, 4), (2, 17, 3)]
CHUNKS = [(CHUNK - 1,), (CHUNK,), (CHUNK + 1,)]
STEPS = 3

COMMON = {
    "deadline": None,  # the machine decides how long a step takes
    "derandomize": True,  # the same examples on every run: a failure is the change's
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow],
}
SAMPLES = st.sampled_from([(case, sample) for case in CASES for sample in case.samples])


def plan_of(shapes):
    """Strategy of a parameter: shape, dtype, group, and in which steps it has a gradient."""
    gradients = st.tuples(*[st.booleans()] * STEPS)
    return st.tuples(st.sampled_from(shapes), st.sampled_from(DTYPES), st.integers(0, 2), gradients)


def make_model(plans):
    generator = torch.Generator().manual_seed(len(plans))
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for shape, dtype, _, _ in plans
    ]


def check_model(pair, plans, tier, threads):
    case, sample = pair
    half = any(dtype == torch.float16 for _, dtype, _, _ in plans)
    kwargs = case.kwargs(sample, torch.float16 if half else torch.float32)
    decays = [kwargs.get("weight_decay", 0.0), 0.0, 0.25]

    together = make_model(plans)
    groups = [
        {
            "params": [p for p, plan in zip(together, plans, strict=True) if plan[2] == number],
            "weight_decay": decay,
        }
        for number, decay in enumerate(decays)
    ]
    optimizer = case.fused()(groups, **kwargs)
    alone = clone_params(together)
    optimizers = [
        case.fused()([param], **{**case.kwargs(sample), **kwargs, "weight_decay": decays[plan[2]]})
        for param, plan in zip(alone, plans, strict=True)
    ]
    for step in range(STEPS):
        for params in (together, alone):
            set_grads(params, step)
            for param, (_, _, _, gradients) in zip(params, plans, strict=True):
                if not gradients[step]:
                    param.grad = None
        resting = [
            (param, param.detach().clone(), states_of(optimizer, param))
            for param in together
            if param.grad is None
        ]
        fusedopt._C.select_tier(tier)
        torch.set_num_threads(threads)
        checked_step(case, optimizer)
        for param, old, states in resting:
            assert torch.equal(param, old)
            now = states_of(optimizer, param)
            assert list(now) == list(states)
            assert all(torch.equal(now[name], states[name]) for name in now)
        fusedopt._C.select_tier("generic")
        torch.set_num_threads(1)
        for own in optimizers:
            own.step()
    for a, b, own in zip(together, alone, optimizers, strict=True):
        assert_same(([a], optimizer), ([b], own))


@pytest.fixture
def restored():
    tier, threads = fusedopt.cpu_tier(), torch.get_num_threads()
    yield
    fusedopt._C.select_tier(tier)
    torch.set_num_threads(threads)


TIERS = st.sampled_from(fusedopt.cpu_tiers())
SMALL_MODELS = st.lists(plan_of(SHAPES), min_size=1, max_size=8)
LARGE_MODELS = st.lists(plan_of(SHAPES), max_size=3).flatmap(
    lambda small: plan_of(CHUNKS).map(lambda large: [*small[:2], large, *small[2:]])
)


# The fixture restores what all examples of a test change; it need not run between them.
SHARED_FIXTURE = [*COMMON["suppress_health_check"], HealthCheck.function_scoped_fixture]


def model_test(models, examples):
    """Decorates a test of `check_model`'s arguments."""

    def decorate(test):
        budget = settings(
            **{**COMMON, "suppress_health_check": SHARED_FIXTURE}, max_examples=examples
        )
        return budget(given(SAMPLES, models, TIERS, st.integers(1, 3))(test))

    return decorate


@model_test(SMALL_MODELS, 400)
def test_grouping_tier_and_threads_do_not_change_a_bit(restored, pair, plans, tier, threads):
    check_model(pair, plans, tier, threads)


@model_test(LARGE_MODELS, 50)
def test_nor_do_chunks(restored, pair, plans, tier, threads):
    check_model(pair, plans, tier, threads)


@pytest.mark.slow
@model_test(st.one_of(SMALL_MODELS, SMALL_MODELS, LARGE_MODELS), 4000)
def test_models_at_length(restored, pair, plans, tier, threads):
    check_model(pair, plans, tier, threads)


def is_number(value):
    return not isinstance(value[0] if isinstance(value, tuple) else value, torch.Tensor)


# Without hyperparameters in fp32 tensors, from which torch computes in fp32: fp64 can be held to a
# few roundings of fp64.
LIVES = st.sampled_from(
    [
        (case, sample)
        for case in CASES
        for sample in case.samples
        if all(map(is_number, sample.kwargs.values()))
    ]
)
INDEX = st.integers(0, 10)


class Life(RuleBasedStateMachine):
    """An optimizer of fusedopt and torch's, to which the same things happen."""

    @initialize(pair=LIVES, count=st.integers(1, 4))
    def start(self, pair, count):
        self.case, sample = pair
        self.seed = 0
        ours = [self.new_param() for _ in range(count)]
        self.params = [ours, clone_params(ours)]
        classes = (self.case.fused(), self.case.torch_class)
        self.optimizers = [
            cls(params, **self.case.kwargs(sample))
            for cls, params in zip(classes, self.params, strict=True)
        ]

    def new_param(self):
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        shape = SHAPES[self.seed * 7 % len(SHAPES)]
        return torch.nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=generator))

    def each(self, change):
        for params, optimizer in zip(self.params, self.optimizers, strict=True):
            change(params, optimizer)

    def pick(self, params, index):
        return params[index % len(params)]

    @rule(missing=st.sets(INDEX), with_closure=st.booleans(), strided=st.booleans())
    def step(self, missing, with_closure, strided):
        self.seed += 1

        def step(params, optimizer):
            def give_gradients():
                set_grads(params, self.seed)
                for index, param in enumerate(params):
                    if index in missing or not param.requires_grad:
                        param.grad = None
                    elif strided:
                        room = torch.zeros(*param.shape, 2, dtype=param.dtype)
                        room[..., 1] = param.grad
                        param.grad = room[..., 1]
                return 0.5

            if with_closure:
                assert optimizer.step(give_gradients) == 0.5
            else:
                give_gradients()
                assert optimizer.step() is None

        self.each(step)

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none):
        self.each(lambda params, optimizer: optimizer.zero_grad(set_to_none=set_to_none))

    @rule()
    def step_over_the_same_gradients(self):
        self.each(lambda params, optimizer: optimizer.step())

    @precondition(lambda self: len(self.params[0]) < 8)
    @rule(lr=st.sampled_from([1e-3, 0.1]))
    def add_group(self, lr):
        new = self.new_param()
        for params, optimizer in zip(self.params, self.optimizers, strict=True):
            params.append(torch.nn.Parameter(new.detach().clone()))
            optimizer.add_param_group({"params": [params[-1]], "lr": lr})

    @rule(index=INDEX, lr=st.floats(0, 0.5), weight_decay=st.sampled_from([0.0, 0.1]))
    def change_numbers(self, index, lr, weight_decay):
        def change(params, optimizer):
            group = self.pick(optimizer.param_groups, index)
            group["lr"], group["weight_decay"] = lr, weight_decay

        self.each(change)

    @rule(index=INDEX)
    def freeze_or_thaw(self, index):
        def change(params, optimizer):
            param = self.pick(params, index)
            param.requires_grad_(not param.requires_grad)
            if not param.requires_grad:
                param.grad = None

        self.each(change)

    @rule(index=INDEX)
    def move_the_parameter(self, index):
        def change(params, optimizer):
            param = self.pick(params, index)
            param.data = param.data.clone() * 0.5

        self.each(change)

    @rule(index=INDEX, in_place=st.booleans())
    def restart_the_states(self, index, in_place):
        def change(params, optimizer):
            state = optimizer.state.get(self.pick(params, index), {})
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and name != "step":
                    state[name] = value.zero_() if in_place else torch.zeros_like(value)

        self.each(change)

    @rule(index=INDEX)
    def forget_a_state(self, index):
        if self.case.name == "adagrad":  # made by the constructor, and missed by torch's step
            return
        self.each(lambda params, optimizer: optimizer.state.pop(self.pick(params, index), None))

    @rule()
    def exchange_checkpoints(self):
        ours, theirs = (copy.deepcopy(optimizer.state_dict()) for optimizer in self.optimizers)
        self.optimizers[0].load_state_dict(theirs)
        self.optimizers[1].load_state_dict(ours)

    @rule()
    def save_and_load(self):
        file = io.BytesIO()
        torch.save(self.optimizers[0].state_dict(), file)
        file.seek(0)
        self.optimizers[0].load_state_dict(torch.load(file, weights_only=True))

    @rule(by_pickle=st.booleans())
    def copy_everything(self, by_pickle):
        # Gradients are no part of a pickled or copied parameter's promise: drop them first.
        self.zero_grad(set_to_none=True)
        for side, both in enumerate(zip(self.params, self.optimizers, strict=True)):
            copied = pickle.loads(pickle.dumps(both)) if by_pickle else copy.deepcopy(both)
            self.params[side], self.optimizers[side] = copied

    @invariant()
    def agrees(self):
        if not hasattr(self, "params"):
            return
        ours, theirs = self.optimizers
        for a, b in zip(*self.params, strict=True):
            assert_close(a, b)
            states = ours.state.get(a, {}), theirs.state.get(b, {})
            assert list(states[0]) == list(states[1])
            for name, value in states[1].items():
                if isinstance(value, torch.Tensor):
                    assert_close(states[0][name], value)
                else:
                    assert states[0][name] == value
        for a, b in zip(ours.param_groups, theirs.param_groups, strict=True):
            assert {**a, "params": len(a["params"])} == {**b, "params": len(b["params"])}


def assert_close(actual, expected):
    """Equal but for fp64 roundings, a hundred of them over a life of steps; dtype and shape too."""
    torch.testing.assert_close(
        actual.detach(), expected.detach(), rtol=1e-11, atol=1e-12, equal_nan=True
    )


@pytest.mark.parametrize(
    ("examples", "steps"), [(150, 25), pytest.param(1500, 40, marks=pytest.mark.slow)]
)
def test_a_life_beside_torch(examples, steps):
    budget = settings(**COMMON, max_examples=examples, stateful_step_count=steps)
    run_state_machine_as_test(Life, settings=budget)
