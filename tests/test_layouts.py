"""Every memory layout a parameter or gradient can have, against the same values laid plainly."""

import pytest
import torch
from cases import CASES
from harness import DTYPES, make_params
from pairs import pairwise

import fusedopt

CASE_IDS = {"ids": lambda case: case.name}


def values(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def channels_last(value):
    return value.clone(memory_format=torch.channels_last)


def column_slice(value):
    room = torch.zeros(*value.shape[:-1], 2 * value.shape[-1] + 3, dtype=value.dtype)
    view = room[..., 3::2]
    view.copy_(value)
    return view


def transposed(value):
    return value.clone().transpose(-1, -2).contiguous().transpose(-1, -2)


def misaligned(value):
    room = torch.zeros(value.numel() + 1, dtype=value.dtype)
    view = room[1:].view(value.shape)
    view.copy_(value)
    return view


def storage_offset(value):
    room = torch.zeros(3, *value.shape, dtype=value.dtype)
    room[1].copy_(value)
    return room[1]


LAYOUTS = {
    "contiguous": torch.clone,
    "channels_last": channels_last,
    "column_slice": column_slice,
    "transposed": transposed,
    "misaligned": misaligned,
    "storage_offset": storage_offset,
}


def stepped(case, kwargs, layout, grad_layout, dtype, shape=(6, 4, 9, 10), steps=3):
    """Values of a parameter and its states after some steps, as plain contiguous tensors."""
    param = torch.nn.Parameter(layout(values(shape, 0, dtype)))
    optimizer = case.fused()([param], **kwargs, backend="cpu")
    for step in range(steps):
        param.grad = grad_layout(values(shape, step + 1, dtype))
        optimizer.step()
    states = {k: v.contiguous() for k, v in optimizer.state.get(param, {}).items()}
    return param.detach().contiguous(), states


@pairwise(case=CASES, layout=LAYOUTS, grad_layout=LAYOUTS, dtype=DTYPES)
def test_layout_changes_no_bit(case, layout, grad_layout, dtype):
    kwargs = case.kwargs(case.richest, dtype)
    expected, expected_states = stepped(case, kwargs, torch.clone, torch.clone, dtype)
    actual, states = stepped(case, kwargs, LAYOUTS[layout], LAYOUTS[grad_layout], dtype)
    assert torch.equal(actual, expected)
    assert list(states) == list(expected_states)
    for key, value in expected_states.items():
        assert torch.equal(states[key], value), key


@pytest.mark.parametrize("case", CASES, **CASE_IDS)
def test_expanded_gradient(case):
    """The gradient of a sum is one number expanded over the parameter (stride 0)."""
    results = []
    for expand in (True, False):
        (param,) = make_params([(7, 33)])
        optimizer = case.fused()([param], lr=0.1, weight_decay=0.1, backend="cpu")
        for _ in range(3):
            param.grad = torch.tensor(0.5).expand(7, 33)
            if not expand:
                param.grad = param.grad.contiguous()
            optimizer.step()
        results.append(param.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("case", CASES, **CASE_IDS)
def test_writes_stay_inside_a_slice(case):
    room = torch.full((8, 50), 3.0)
    param = room[1:7, 5:40:3].requires_grad_()
    optimizer = case.fused()([param], lr=0.1, backend="cpu")
    param.grad = torch.ones_like(param)
    optimizer.step()
    mask = torch.ones_like(room, dtype=torch.bool)
    mask[1:7, 5:40:3] = False
    assert (room[mask] == 3.0).all()
    assert (room[~mask] != 3.0).all()


@pytest.mark.parametrize("case", CASES, **CASE_IDS)
def test_complex_parameters_are_pairs_of_real_ones(case):
    for sample in case.samples:
        kwargs = case.kwargs(sample)
        outcomes = []
        for optimizer_class in (case.fused(), case.torch_class):
            generator = torch.Generator().manual_seed(0)
            params = [
                torch.nn.Parameter(torch.randn(5, 7, dtype=torch.complex64, generator=generator)),
                torch.nn.Parameter(torch.randn(4, dtype=torch.complex128, generator=generator)),
            ]
            optimizer = optimizer_class(params, **kwargs)
            for _ in range(3):
                for param in params:
                    param.grad = torch.randn(param.shape, dtype=param.dtype, generator=generator)
                # A gradient of another layout, as backward through a transpose leaves it.
                params[0].grad = params[0].grad.t().contiguous().t()
                optimizer.step()
            outcomes.append(params)
        for ours, theirs in zip(*outcomes, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_conjugated_gradients_take_torchs_path():
    outcomes = []
    for optimizer_class in (fusedopt.SGD, torch.optim.SGD):
        generator = torch.Generator().manual_seed(0)
        param = torch.nn.Parameter(torch.randn(9, dtype=torch.complex64, generator=generator))
        optimizer = optimizer_class([param])
        param.grad = torch.randn(9, dtype=torch.complex64, generator=generator).conj()
        optimizer.step()
        outcomes.append(param.detach())
    assert torch.equal(*outcomes)


@pytest.mark.parametrize("case", CASES, **CASE_IDS)
def test_zero_size_at_every_position(case):
    shapes = [(4096,), (0,), (3,), (70_000,)]
    for position in range(len(shapes) + 1):
        with_empty = make_params([*shapes[:position], (0, 5), *shapes[position:]])
        without = make_params(shapes)
        kept = with_empty[:position] + with_empty[position + 1 :]
        for a, b in zip(kept, without, strict=True):
            a.data.copy_(b.data)
        optimizer = case.fused()(with_empty, lr=0.1)
        other = case.fused()(without, lr=0.1)
        for param in (*with_empty, *without):
            param.grad = torch.ones_like(param)
        optimizer.step()
        other.step()
        for a, b in zip(kept, without, strict=True):
            assert torch.equal(a, b)
        if case.has_step:
            assert optimizer.state[with_empty[position]]["step"] == 1


def test_copy_on_write_parameters_are_materialised():
    source = values((100,), 0)
    param = torch.nn.Parameter(torch._lazy_clone(source))
    assert torch._C._is_cow_tensor(param)
    optimizer = fusedopt.SGD([param], lr=1.0)
    param.grad = torch.ones(100)
    before = source.clone()
    optimizer.step()
    assert torch.equal(source, before), (
        "the step wrote into the tensor the parameter was cloned from"
    )
    assert torch.equal(param.detach(), before - 1)


def test_copy_on_write_parameter_and_gradient_of_one_storage():
    source = values((100,), 0)
    param = torch.nn.Parameter(torch._lazy_clone(source))
    param.grad = torch._lazy_clone(source)
    expected = source - source
    fusedopt.SGD([param], lr=1.0).step()
    assert torch.equal(param.detach(), expected)
    assert torch.equal(param.grad, source)


@pytest.mark.parametrize("case", CASES, **CASE_IDS)
def test_overlapping_parameters_run_in_torchs_order(case):
    outcomes = []
    for optimizer_class in (case.fused(), case.torch_class):
        base = values((100,), 0)
        params = [torch.nn.Parameter(base[:60]), torch.nn.Parameter(base[40:])]
        params.append(torch.nn.Parameter(values((5,), 1)))
        optimizer = optimizer_class(params, lr=0.1, weight_decay=0.1)
        for step in range(3):
            for i, param in enumerate(params):
                param.grad = values(param.shape, 10 * step + i)
            optimizer.step()
        outcomes.append((base, params[2].detach()))
        if optimizer_class is case.fused():
            assert [route.backend for route in optimizer.routes()] == ["torch", "torch", "cpu"]
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    torch.testing.assert_close(outcomes[0][1], outcomes[1][1])


@pytest.mark.parametrize("case", CASES, **CASE_IDS)
def test_a_parameter_listed_twice_is_stepped_twice_as_in_torch(case):
    outcomes = []
    for optimizer_class in (case.fused(), case.torch_class):
        (param,) = make_params([(9,)])
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = optimizer_class([param, param], lr=0.1)
        param.grad = torch.ones(9)
        optimizer.step()
        outcomes.append(param.detach())
    assert torch.equal(*outcomes)


def test_a_gradient_that_is_the_parameter_itself():
    outcomes = []
    for optimizer_class in (fusedopt.AdamW, torch.optim.AdamW):
        (param,) = make_params([(50,)])
        param.grad = param.detach()
        optimizer = optimizer_class([param], lr=0.1, weight_decay=0.5)
        optimizer.step()
        outcomes.append(param.detach())
    assert torch.equal(*outcomes)


def one_gradient(params):
    """The same tensor for all."""
    shared = values((60,), 9)
    for param in params:
        param.grad = shared


def views_of_a_bucket(params):
    """Gradients side by side in one tensor, as DistributedDataParallel lays them."""
    bucket = values((180,), 9)
    for param, view in zip(params, bucket.split(60), strict=True):
        param.grad = view


def overlapping_views(params):
    flat = values((100,), 9)
    for index, param in enumerate(params):
        param.grad = flat[20 * index : 20 * index + 60]


@pytest.mark.parametrize("give", [one_gradient, views_of_a_bucket, overlapping_views])
@pytest.mark.parametrize("case", CASES, **CASE_IDS)
def test_gradients_that_share_memory(anywhere, case, give):
    """They are only read: the results are those of gradients of their own."""
    ends = []
    for shared in (True, False):
        params = make_params([(60,)] * 3)
        give(params)
        for param in params:
            grad = param.grad.detach() if shared else param.grad.clone()
            param.grad, param.data = None, param.data.to(anywhere.device)
            param.grad = grad.to(anywhere.device)
        optimizer = case.fused()(params, lr=0.1, weight_decay=0.1, backend=anywhere.backend)
        for _ in range(3):
            optimizer.step()
        ends.append([param.detach().cpu() for param in params])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    """Index arithmetic is 64-bit: first, boundary, middle and last elements all move."""
    numel = 2**31 + 70_000
    param = torch.nn.Parameter(torch.zeros(numel, dtype=torch.bfloat16))
    param.grad = torch.zeros(numel, dtype=torch.bfloat16)
    at = torch.tensor([0, 1, 2**30, 2**31 - 1, 2**31, 2**31 + 1, numel - 1])
    param.grad[at] = 1.0
    optimizer = fusedopt.SGD([param], lr=0.5, backend="cpu")
    optimizer.step()
    assert (param.detach()[at] == -0.5).all()
    assert int(torch.count_nonzero(param.detach().view(torch.int16))) == len(at)
