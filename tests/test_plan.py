"""The plan: what it groups, and that nothing can change behind its back without being seen.

Every invalidation is tested by name: fusedopt and torch.optim walk side by side, the change is made
to both, and they must still agree. A plan that missed it would write through stale pointers.
"""

import copy
import gc
import weakref

import pytest
import torch
from cases import CASES, case_samples
from harness import clone_params, make_params, set_grads, states_of

import fusedopt


class Pair:
    """fusedopt and torch.optim side by side on parameters of equal values."""

    def __init__(self, case_or_name="AdamW", params=None, **kwargs):
        kwargs = {"lr": 0.05, **kwargs}
        ours = params if params is not None else make_params([(8, 6), (5,), (40,)])
        self.params = [ours, clone_params(ours)]
        self.optimizers = [
            getattr(fusedopt, case_or_name)(self.params[0], **kwargs),
            getattr(torch.optim, case_or_name)(self.params[1], **kwargs),
        ]
        self.count = 0

    @property
    def ours(self):
        return self.optimizers[0]

    def step(self, times=1, without=()):
        for _ in range(times):
            self.count += 1
            for params, optimizer in zip(self.params, self.optimizers, strict=True):
                set_grads(params, self.count)
                for index in without:
                    params[index].grad = None
                optimizer.step()
        self.check()

    def both(self, change):
        for params, optimizer in zip(self.params, self.optimizers, strict=True):
            change(params, optimizer)

    def check(self):
        for a, b in zip(*self.params, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
            ours, theirs = states_of(self.ours, a), states_of(self.optimizers[1], b)
            assert list(ours) == list(theirs)
            for key, value in theirs.items():
                assert ours[key].dtype == value.dtype
                torch.testing.assert_close(ours[key], value, rtol=2e-6, atol=2e-6)

    def plan(self):
        return self.ours._packed


def test_one_plan_serves_all_steps():
    pair = Pair()
    pair.step(2)
    plan = pair.plan()
    pair.step(5)
    assert pair.plan() is plan


@pytest.mark.parametrize("how", ["by_hand", "in_the_dict", "load_state_dict"])
def test_a_replaced_state_is_seen(how):
    pair = Pair()
    pair.step(3)

    def replace(params, optimizer):
        if how == "by_hand":
            optimizer.state[params[0]]["exp_avg"] = torch.full((8, 6), 0.25)
        elif how == "in_the_dict":
            state = optimizer.state[params[1]]
            optimizer.state[params[1]] = {k: v.clone() * 2 for k, v in state.items()}
        else:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    pair.both(replace)
    pair.step(3)
    assert pair.plan().plan.describe()[0]["rows"] == 3


def test_a_state_of_another_dtype_is_seen():
    """bf16 parameters whose states were widened by hand: computed from and stored as fp32."""
    (param,) = make_params([(64,)], torch.bfloat16)
    optimizer = fusedopt.Adam([param])
    set_grads([param], 0)
    optimizer.step()
    state = optimizer.state[param]
    state["exp_avg"], state["exp_avg_sq"] = state["exp_avg"].float(), state["exp_avg_sq"].float()
    expected = 0.9 * state["exp_avg"] + (1 - 0.9) * param.grad.float()
    optimizer.step()
    assert optimizer._packed.plan.describe()[0]["storage"] == ("bfloat16", "bfloat16", "float32")
    torch.testing.assert_close(state["exp_avg"], expected)


def test_a_state_dtype_no_kernel_has_is_torchs_to_judge():
    pair = Pair("Adam")
    pair.step(2)
    for key in ("exp_avg", "exp_avg_sq"):
        state = pair.ours.state[pair.params[0][0]]
        state[key] = state[key].double()
    assert [route.backend for route in pair.ours.routes()] == ["torch", "cpu", "cpu"]
    before = [param.detach().clone() for param in pair.params[0]]
    with pytest.raises(RuntimeError, match="expected dtype double"):  # torch's own words
        pair.ours.step()
    assert all(torch.equal(p, b) for p, b in zip(pair.params[0], before, strict=True))


@pytest.mark.parametrize("how", ["data", "module_to", "same_memory_other_strides"])
def test_moved_storage_is_seen(how):
    pair = Pair(params=make_params([(6, 6), (5,)]))
    pair.step(2)

    def move(params, optimizer):
        if how == "data":
            params[0].data = params[0].data.clone() + 1
        elif how == "module_to":
            params[0].data = params[0].data.double().float()
        else:
            params[0].data = params[0].data.t()

    pair.both(move)
    pair.step(3)


def test_swapped_tensors_are_seen():
    pair = Pair()
    pair.step(2)

    def swap(params, optimizer):
        params[0].grad = None
        torch.utils.swap_tensors(params[0], torch.nn.Parameter(torch.ones(8, 6)))

    pair.both(swap)
    pair.step(3)


CONVERSIONS = {
    "clone": lambda module: module._apply(torch.clone),
    "channels_last": lambda module: module.to(memory_format=torch.channels_last),
    "double": lambda module: module.double(),
    "bfloat16": lambda module: module.to(torch.bfloat16),
    "there and back": lambda module: module.double().float(),
}


@pytest.mark.parametrize("keep_gradients", [False, True], ids=["no gradients", "gradients"])
@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_module_converted_by_swapping_its_parameters_is_seen(case, conversion, keep_gradients):
    """After steps were taken. Where torch.optim cannot go on, neither can we, for its reason.

    But for bf16 parameters whose states stayed in fp32: kernels update these.
    """
    outcomes = []
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for optimizer_class in (case.fused(), case.torch_class):
            module = torch.nn.Conv2d(3, 4, 2)
            params = [*module.parameters()]
            for param, value in zip(params, make_params([(4, 3, 2, 2), (4,)]), strict=True):
                param.data.copy_(value.detach())
            optimizer = optimizer_class(params, lr=0.05)
            for step in range(2):
                set_grads(params, step)
                optimizer.step()
            if not keep_gradients:
                optimizer.zero_grad()
            before = [id(param) for param in params]
            CONVERSIONS[conversion](module)
            assert [id(param) for param in module.parameters()] == before
            try:
                for step in range(2, 4):
                    if not keep_gradients or step > 2:
                        set_grads(params, step)
                    optimizer.step()
                error = None
            except RuntimeError as raised:
                error = str(raised)
            steps = [optimizer.state.get(param, {}).get("step") for param in params]
            outcomes.append((error, steps, [param.detach() for param in params]))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    (error, steps, ours), (its_error, its_steps, theirs) = outcomes
    if its_error is not None and conversion == "bfloat16":
        assert error is None
        return
    assert error == its_error
    if error is None:
        assert steps == its_steps
    tolerance = 2e-2 if ours[0].dtype == torch.bfloat16 else 2e-6
    for a, b in zip(ours, theirs, strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_parameters_swapped_with_each_other_are_seen():
    """Each takes the other's memory; the states stay with the objects."""
    pair = Pair(params=make_params([(8, 6), (8, 6)]))
    pair.step(2)

    def swap(params, optimizer):
        optimizer.zero_grad()
        torch.utils.swap_tensors(params[0], params[1])

    pair.both(swap)
    pair.step(3)


def test_swapped_states_are_seen():
    pair = Pair()
    pair.step(2)

    def swap(params, optimizer):
        state = optimizer.state[params[0]]
        torch.utils.swap_tensors(state["exp_avg"], state["exp_avg_sq"].clone())

    pair.both(swap)
    pair.step(2)


def test_a_state_whose_storage_moved_is_seen():
    pair = Pair()
    pair.step(2)

    def move(params, optimizer):
        optimizer.state[params[0]]["exp_avg"].data = torch.ones(8, 6)

    pair.both(move)
    pair.step(2)


def test_parameter_cast_to_another_dtype_is_seen():
    pair = Pair("SGD", momentum=0.9)
    pair.step(2)

    def cast(params, optimizer):
        params[0].grad = None
        params[0].data = params[0].data.double()
        optimizer.state[params[0]]["momentum_buffer"] = torch.zeros(8, 6, dtype=torch.float64)

    pair.both(cast)
    pair.step(2)
    assert {table["storage"][0] for table in pair.plan().plan.describe()} == {"float32", "float64"}


def test_none_gradients_step_nothing_and_keep_their_count():
    pair = Pair()
    pair.step(2)
    plan = pair.plan()
    pair.step(1, without=[1])
    pair.step(2, without=[0, 2])
    pair.step(2)
    assert pair.plan() is plan, "a missing gradient needs no new plan"
    counts = [int(pair.ours.state[p]["step"]) for p in pair.params[0]]
    assert counts == [5, 6, 5]


def test_a_first_gradient_after_steps_without_one():
    pair = Pair()
    pair.step(2, without=[1])
    assert len(pair.ours.state) == 2
    pair.step(2)
    assert len(pair.ours.state) == 3


def test_no_gradient_at_all():
    pair = Pair()
    pair.step(1, without=[0, 1, 2])
    assert not pair.ours.state
    pair.step(1)


def test_gradient_of_another_layout_is_seen():
    pair = Pair()
    pair.step(2)
    for params, optimizer in zip(pair.params, pair.optimizers, strict=True):
        set_grads(params, 50)
        params[0].grad = params[0].grad.t().contiguous().t()
        optimizer.step()
    pair.check()
    assert pair.plan().plan.describe()[0]["strided_rows"] == 1
    pair.step(2)
    assert pair.plan().plan.describe()[0]["strided_rows"] == 0


def test_gradient_of_another_dtype_is_seen():
    (param,) = make_params([(64,)], torch.bfloat16)
    optimizer = fusedopt.SGD([param], lr=0.5)
    param.grad = torch.ones(64, dtype=torch.bfloat16)
    optimizer.step()
    param.grad = None
    param.grad_dtype = torch.float32
    param.grad = torch.full((64,), 0.5)
    before = param.detach().clone()
    optimizer.step()
    assert torch.equal(param.detach(), (before.float() - 0.25).bfloat16())
    assert optimizer._packed.plan.describe()[0]["storage"] == ("bfloat16", "float32", "bfloat16")


def test_alternating_sparse_and_dense_gradients():
    pair = Pair("SGD", params=make_params([(8, 6), (5,)]), momentum=0.0)
    for step in range(4):
        for params, optimizer in zip(pair.params, pair.optimizers, strict=True):
            set_grads(params, step)
            if step % 2:
                params[0].grad = params[0].grad.to_sparse()
            optimizer.step()
        pair.check()
        assert pair.ours.routes()[0].backend == ("torch" if step % 2 else "cpu")


def test_added_group_is_seen():
    pair = Pair()
    pair.step(2)
    extra = make_params([(30,)], seed=5)
    for params, optimizer in zip(pair.params, pair.optimizers, strict=True):
        new = clone_params(extra)
        params.extend(new)
        optimizer.add_param_group({"params": new, "lr": 0.5})
    pair.step(3)
    assert [int(pair.ours.state[p]["step"]) for p in pair.params[0]] == [5, 5, 5, 3]


def test_members_added_removed_and_exchanged_in_a_group():
    pair = Pair()
    pair.step(2)

    def exchange(params, optimizer):
        (new,) = make_params([(12,)], seed=3)
        members = optimizer.param_groups[0]["params"]
        del members[1]
        members.append(new)
        params[1] = new

    pair.both(exchange)
    pair.step(3)


def test_requires_grad_changed():
    """As in torch, a frozen parameter is stepped as long as it has a gradient, and no longer."""
    pair = Pair()
    pair.step(2)
    pair.both(lambda params, optimizer: params[0].requires_grad_(False))
    pair.step(1)
    pair.step(2, without=[0])
    pair.both(lambda params, optimizer: params[0].requires_grad_(True))
    pair.step(2)


@pytest.mark.parametrize(
    ("name", "kwargs", "change"),
    [
        ("SGD", {"momentum": 0.9}, {"nesterov": True}),
        ("SGD", {"momentum": 0.9}, {"momentum": 0}),
        ("SGD", {}, {"momentum": 0.5}),
        ("AdamW", {}, {"decoupled_weight_decay": False}),
        ("Adam", {"weight_decay": 0.1}, {"maximize": True}),
        ("Adam", {"amsgrad": True}, {"amsgrad": False}),
        ("RMSprop", {"centered": True}, {"centered": False}),
        ("Adagrad", {}, {"lr_decay": 0.3}),
        ("Adam", {}, {"lr": 0.5, "betas": (0.5, 0.6), "eps": 1e-3}),
    ],
)
def test_changed_hyperparameters_and_flags_are_seen(name, kwargs, change):
    pair = Pair(name, **kwargs)
    pair.step(2)
    pair.both(lambda params, optimizer: optimizer.param_groups[0].update(change))
    pair.step(3)


@pytest.mark.parametrize("in_place", [False, True])
def test_numbers_are_seen_wherever_they_stand(in_place):
    """A float is another object when it changes; a list and a tensor need not be."""
    pair = Pair("AdamW")

    def give(params, optimizer):
        group = optimizer.param_groups[0]
        if in_place and "note" in group:
            group["betas"][0] = 0.5
            group["lr"].fill_(0.2)
        elif in_place:
            group |= {"betas": [0.9, 0.99], "lr": torch.tensor(0.05), "note": 1}
        else:  # in another order
            lr = group.pop("lr")
            group["lr"] = lr * 1.5

    for _ in range(2):
        pair.both(give)
        pair.step(2)


def test_a_value_that_is_no_number_raises_at_every_step_until_it_is_one():
    pair = Pair("SGD")
    pair.step(2)
    for bad in ("fast", 10**400):
        pair.ours.param_groups[0]["lr"] = bad
        for _ in range(2):
            with pytest.raises((TypeError, OverflowError)):
                pair.ours.step()
    pair.ours.param_groups[0]["lr"] = 0.05
    pair.step(2)


def test_what_is_not_read_of_a_group_is_not_kept_alive():
    pair = Pair("SGD")
    thing = make_params([(3,)])[0]
    pair.ours.param_groups[0]["note"] = thing
    pair.step(2)
    seen = weakref.ref(thing)
    del pair.ours.param_groups[0]["note"], thing
    assert seen() is None
    pair.step(1)


def test_a_flag_whose_state_is_missing_raises_as_in_torch_and_changes_nothing():
    pair = Pair("Adam")
    pair.step(2)
    pair.both(lambda params, optimizer: optimizer.param_groups[0].update(amsgrad=True))
    before = [p.detach().clone() for p in pair.params[0]]
    states = [states_of(pair.ours, p) for p in pair.params[0]]
    with pytest.raises(KeyError, match="max_exp_avg_sq"):
        pair.ours.step()
    for param, value, state in zip(pair.params[0], before, states, strict=True):
        assert torch.equal(param, value)
        for key, tensor in states_of(pair.ours, param).items():
            assert torch.equal(tensor, state[key])


def test_differentiable_switched_on_is_seen():
    pair = Pair("SGD")
    pair.step(1)
    pair.ours.param_groups[0]["differentiable"] = True
    assert {route.backend for route in pair.ours.routes()} == {"torch"}
    pair.step(1)


def test_step_counts_set_by_hand():
    pair = Pair()
    pair.step(2)

    def reset(params, optimizer):
        optimizer.state[params[0]]["step"].fill_(0)
        optimizer.state[params[1]]["step"] = torch.tensor(100.0)

    pair.both(reset)
    pair.step(2)
    assert pair.plan().plan.describe()[0]["slots"] == 3


def test_tables_by_dtype_and_flags_with_groups_sharing_them():
    params = [*make_params([(4,), (5,)]), *make_params([(6,)], torch.float64)]
    groups = [
        {"params": [params[0]], "lr": 0.1},
        {"params": [params[1]], "lr": 0.2},
        {"params": [params[2]], "amsgrad": True},
    ]
    optimizer = fusedopt.Adam(groups)
    set_grads(params, 0)
    optimizer.step()
    tables = optimizer._packed.plan.describe()
    assert [(t["storage"][0], t["rows"], t["slots"]) for t in tables] == [
        ("float32", 2, 2),
        ("float64", 1, 1),
    ]


def test_ten_thousand_rows_are_cut_into_chunks_that_cover_every_element():
    params = make_params([(n,) for n in [1, 200_000, 3, 0, 65_536, 65_537] + [7] * 3000])
    optimizer = fusedopt.SGD(params, lr=1.0)
    before = [p.detach().clone() for p in params]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    for param, value in zip(params, before, strict=True):
        assert torch.equal(param.detach(), value - 1)
    table = optimizer._packed.plan.describe()[0]
    assert table["rows"] == len(params)
    assert 5 <= table["chunks"] <= 12


@pytest.mark.parametrize(("case", "sample"), case_samples())
def test_version_counters_are_bumped_as_by_torchs_default_step(case, sample):
    ours, theirs = make_params([(6,), (2, 3)]), make_params([(6,), (2, 3)])
    for params, optimizer_class in ((ours, case.fused()), (theirs, case.torch_class)):
        optimizer = optimizer_class(params, **case.kwargs(sample))
        set_grads(params, 0)
        optimizer.step()
        for param in params:
            written = [param, *(v for v in optimizer.state.get(param, {}).values())]
            before = [tensor._version for tensor in written]
            grad = param.grad._version
            optimizer.step()
            assert all(t._version > v for t, v in zip(written, before, strict=True))
            assert param.grad._version == grad, "the gradient was not written"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_backward_through_a_stepped_parameter_raises(case):
    (weight,) = make_params([(4, 4)])
    optimizer = case.fused()([weight], lr=0.1)
    x = torch.randn(4, 4, requires_grad=True)
    loss = (x @ weight).square().sum()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_plan_keeps_no_gradient_or_state_alive():
    pair = Pair()
    pair.step(1)
    param = pair.params[0][0]
    state_storage = pair.ours.state[param]["exp_avg"].untyped_storage()._weak_ref()
    grad_storage = param.grad.untyped_storage()._weak_ref()
    param.grad = None
    pair.ours.state[param]["exp_avg"] = torch.zeros(8, 6)
    gc.collect()
    expired = torch.UntypedStorage._expired
    assert expired(grad_storage)
    assert expired(state_storage)
    torch.UntypedStorage._free_weak_ref(grad_storage)
    torch.UntypedStorage._free_weak_ref(state_storage)
