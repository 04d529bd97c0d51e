"""Properties that hold for every model, looked for by hypothesis.

Lists of parameters of any shape around the edges of vectors and chunks, in any dtypes, split into
groups, with gradients that come and go: whatever the grouping, the tier and the threads, the bits
are those of each parameter stepped alone, and each step is within the oracle's bound. Sequences of
what programs do to an optimizer between steps are in test_life_stories.py.
"""

import pytest
import torch
from cases import CASES
from harness import DTYPES, assert_same, checked_step, clone_params, set_grads, states_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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


@model_test(SMALL_MODELS, 120)
def test_grouping_tier_and_threads_do_not_change_a_bit(restored, pair, plans, tier, threads):
    check_model(pair, plans, tier, threads)


@model_test(LARGE_MODELS, 15)
def test_nor_do_chunks(restored, pair, plans, tier, threads):
    check_model(pair, plans, tier, threads)


@pytest.mark.slow
@model_test(st.one_of(SMALL_MODELS, SMALL_MODELS, LARGE_MODELS), 3000)
def test_models_at_length(restored, pair, plans, tier, threads):
    check_model(pair, plans, tier, threads)
