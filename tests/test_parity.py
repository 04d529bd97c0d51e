"""The numerics: every sample of every row against the float64 oracle, torch.optim, and itself."""

import pytest
import torch
from cases import CASES, case_samples
from harness import (
    DTYPES,
    SHAPES,
    assert_same,
    checked_step,
    clone_params,
    make_params,
    run,
    set_grads,
    states_of,
)
from pairs import samples_in

import fusedopt


@samples_in(DTYPES)
def test_every_step_is_within_the_bound_of_the_oracle(case, sample, dtype):
    params = make_params(dtype=dtype)
    optimizer = case.fused()(params, **case.kwargs(sample, dtype), backend="cpu")
    before = clone_params(params)
    for step in range(5):
        set_grads(params, step)
        checked_step(case, optimizer)
    for new, old in zip(params, before, strict=True):
        if new.numel() > 30:  # in bf16 one small update may round to nothing, but not all of many
            assert not torch.equal(new, old), "nothing moved"


@samples_in([torch.float32, torch.float64])
def test_trajectory_is_torchs(case, sample, dtype):
    ours, theirs = make_params(dtype=dtype), make_params(dtype=dtype)
    # With a float32 lr or betas torch rounds its scalars to float32 even for float64 parameters.
    kwargs = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda t: t.to(dtype), case.kwargs(sample)
    )
    a = run(case.fused(), ours, {**kwargs, "backend": "cpu"}, steps=20)
    b = run(case.torch_class, theirs, kwargs, steps=20)
    # 20 steps of a few ulps each; a centered variance near zero magnifies them (conditioning).
    ulps = 2000 if sample.kwargs.get("centered") else 200
    eps = torch.finfo(dtype).eps
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=ulps * eps, atol=ulps * eps)
        mine_state, other_state = states_of(a, mine), states_of(b, other)
        assert list(mine_state) == list(other_state)
        for key, value in other_state.items():
            assert mine_state[key].dtype == value.dtype
            assert mine_state[key].stride() == value.stride()
            torch.testing.assert_close(mine_state[key], value, rtol=ulps * eps, atol=ulps * eps)


@pytest.mark.parametrize(("case", "sample"), case_samples())
def test_the_update_itself_from_zero(case, sample):
    """From p = 0 the parameter is the update, so that no error hides under the old value."""
    params = [torch.nn.Parameter(torch.zeros(41)) for _ in range(2)]
    optimizer = case.fused()(params, **{**case.kwargs(sample), "weight_decay": 0.0})
    set_grads(params, 0)
    checked_step(case, optimizer)
    assert (params[0] != 0).all()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_torchs_own_bfloat16_step_is_not_within_the_bound(case):
    """The bound has teeth: torch's eager bf16 step, which rounds at every operation, breaks it."""
    sample = next(s for s in case.samples if s.kwargs.get("weight_decay"))
    params = make_params([(4001,)], torch.bfloat16)
    optimizer = case.torch_class(params, **case.kwargs(sample), foreach=False)

    def five_steps():
        for step in range(5):
            set_grads(params, step)
            checked_step(case, optimizer)

    with pytest.raises(AssertionError):
        five_steps()


@pytest.fixture
def restore_tier():
    tier = fusedopt.cpu_tier()
    yield
    fusedopt._C.select_tier(tier)


@samples_in(DTYPES)
def test_all_tiers_are_bitwise_equal(case, sample, dtype, restore_tier):
    tiers = fusedopt.cpu_tiers()
    assert tiers[0] == "generic"
    runs = []
    for tier in tiers:
        fusedopt._C.select_tier(tier)
        assert fusedopt.cpu_tier() == tier
        params = make_params([*SHAPES, (257,), (1025,)], dtype)
        runs.append((params, run(case.fused(), params, case.kwargs(sample, dtype))))
    for other in runs[1:]:
        assert_same(runs[0], other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tail_length_in_every_tier(dtype, restore_tier):
    """Sizes 0 to four vectors plus one, alone and side by side (trap: SIMD paths that skip)."""
    sizes = range(4 * 64 // torch.empty((), dtype=dtype).element_size() + 2)
    results = []
    for tier in fusedopt.cpu_tiers():
        fusedopt._C.select_tier(tier)
        params = [torch.nn.Parameter(torch.zeros(n, dtype=dtype)) for n in sizes]
        optimizer = run(fusedopt.AdamW, params, {"lr": 0.1, "eps": 0.1}, steps=2)
        assert all((param != 0).all() for param in params)
        results.append((params, optimizer))
    for other in results[1:]:
        assert_same(results[0], other)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_result_depends_on_nothing_but_values(case):
    """Bitwise: grouping, order of parameters, and number of threads change nothing."""
    shapes = [(70_001,), (5,), (300, 300), (64,)] * 2
    sample = next(s for s in case.samples if s.kwargs.get("weight_decay"))
    kwargs = case.kwargs(sample)

    def result(threads, split, reverse):
        torch.set_num_threads(threads)
        params = make_params(shapes)
        ordered = params[::-1] if reverse else params
        groups = [{"params": [p]} for p in ordered] if split else ordered
        optimizer = case.fused()(groups, **kwargs)
        for step in range(3):
            set_grads(params, step)
            optimizer.step()
        return params, optimizer

    threads = torch.get_num_threads()
    try:
        expected = result(1, False, False)
        for variation in ((2, False, False), (2, True, False), (1, False, True), (3, True, True)):
            assert_same(expected, result(*variation))
    finally:
        torch.set_num_threads(threads)


def test_nan_and_infinity_propagate_as_in_torch():
    for case in CASES:
        for sample in case.samples:
            ours, theirs = make_params([(40,)]), make_params([(40,)])
            for params in (ours, theirs):
                set_grads(params, 0)
                for at, bad in ((3, float("nan")), (7, float("inf")), (11, -float("inf"))):
                    params[0].grad[at] = bad
            case.fused()(ours, **case.kwargs(sample)).step()
            case.torch_class(theirs, **case.kwargs(sample)).step()
            torch.testing.assert_close(ours[0], theirs[0], equal_nan=True)
