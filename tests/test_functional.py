"""The operators: the bits of the classes, what torch asks of an operator, and errors."""

import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
from cases import ADAM, CASES, case_samples
from harness import DTYPES, clone_params, make_params, set_grads, states_of

from fusedopt import _C, functional

EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
EACH_SAMPLE = pytest.mark.parametrize(("case", "sample"), case_samples())


def operator(case):
    return getattr(torch.ops.fusedopt, f"{case.name}_")


def spelled(kwargs):
    """A constructor's keywords as an operator's; states are the caller's to initialise."""
    kwargs = {k: v for k, v in kwargs.items() if k != "initial_accumulator_value"}
    for i, beta in enumerate(kwargs.pop("betas", ())):
        kwargs[f"beta{i + 1}"] = float(beta)
    return kwargs


def new_states(case, optimizer, params):
    """Lists of fresh states, as the class makes them, under the operator's names."""
    names = _C.state_names(case.name, optimizer.param_groups[0])
    value = optimizer.defaults.get("initial_accumulator_value", 0)
    lists = {
        f"{name}s": [torch.full_like(p, value) for p in params] if name in names else []
        for name in case.states
    }
    if case.has_step:
        lists["state_steps"] = [torch.tensor(0.0) for _ in params]
    return lists


def arguments(case, kwargs=None, params=None, seed=0):
    """(params, grads), keywords: a first step, all of it valid."""
    params = make_params([(3, 5), (37,)]) if params is None else params
    set_grads(params, seed)
    kwargs = kwargs or {}
    states = new_states(case, case.fused()(params, **kwargs), params)
    plain = [param.detach() for param in params]
    return (plain, [param.grad for param in params]), {**states, **spelled(kwargs)}


def snapshot(args, kwargs):
    flat = [*args[0], *args[1]]
    for value in kwargs.values():
        flat += value if isinstance(value, list) else []
    return flat, [(tensor.clone(), tensor._version) for tensor in flat]


def test_every_rule_has_an_operator():
    names = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("fusedopt::")}
    assert names == {f"fusedopt::{rule}_" for rule in _C.rules()}


@EACH_CASE
def test_arguments_are_spelled_as_torch_spells_them(case):
    """The keywords of torch's functional API, with the defaults of the constructor."""
    functional = vars(sys.modules[case.torch_class.__module__])[case.name]
    theirs = inspect.signature(functional).parameters
    schema = operator(case).default._schema
    ours = {a.name: a for a in schema.arguments}
    assert list(ours)[:2] == ["params", "grads"]
    ignored = {"capturable", "differentiable", "foreach", "fused", "has_complex"}
    ignored |= {"has_sparse_grad", "grad_scale", "found_inf"}
    lists = {f"{name}s" for name in case.states}
    hyper = [n for n in ours if n not in {"params", "grads", "is_first_step", *lists}]
    assert set(hyper) <= set(theirs)
    keywords = {n for n, p in theirs.items() if p.annotation in ("bool", "float", bool, float)}
    assert keywords - ignored - {"lr"} <= set(hyper)
    defaults = case.fused()(make_params()).defaults
    betas = dict(zip(("beta1", "beta2"), defaults.get("betas", ()), strict=False))
    for name in set(hyper) - {"state_steps"}:
        assert ours[name].default_value == {**defaults, **betas}[name]
    mutable = {a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write}
    assert mutable == {"params", *lists, *(["state_steps"] if case.has_step else [])}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EACH_SAMPLE
def test_bits_are_the_classes(case, sample, dtype):
    kwargs = case.kwargs(sample, dtype)
    params = make_params(dtype=dtype)
    others = clone_params(params)
    optimizer = case.fused()(params, **kwargs)
    states = new_states(case, optimizer, others)
    for step in range(3):
        set_grads(params, step)
        set_grads(others, step)
        grads = [param.grad for param in others]
        for param in others:
            param.grad = None
        optimizer.step()
        first = {} if case.has_step else {"is_first_step": step == 0}
        with torch.no_grad():
            operator(case)(others, grads, **states, **first, **spelled(kwargs))
    for index, (param, other) in enumerate(zip(params, others, strict=True)):
        assert torch.equal(param, other)
        for name, value in states_of(optimizer, param).items():
            given = states["state_steps" if name == "step" else f"{name}s"]
            assert torch.equal(value, given[index]), name


def opcheck(case, sample):
    args, kwargs = arguments(case, case.kwargs(sample))
    overload = "tensor_lr" if isinstance(kwargs.get("lr"), torch.Tensor) else "default"
    results = torch.library.opcheck(getattr(operator(case), overload), args, kwargs)
    assert set(results.values()) == {"SUCCESS"}


def distinct_samples():
    """The first sample of every overload and set of states."""
    seen = {}
    for parameters in case_samples():
        case, sample = parameters.values
        _, kwargs = arguments(case, case.kwargs(sample))
        used = tuple(name for name in kwargs if kwargs[name] == [])
        seen.setdefault((case.name, used, type(kwargs.get("lr", 0.0))), parameters)
    return [*seen.values()]


@pytest.mark.parametrize(("case", "sample"), distinct_samples())
def test_opcheck_finds_nothing(case, sample):
    """Schema, autograd registration, fake tensors, and the operator under AOTAutograd."""
    opcheck(case, sample)


@pytest.mark.slow
@EACH_SAMPLE
def test_opcheck_finds_nothing_in_any_sample(case, sample):
    opcheck(case, sample)


@EACH_CASE
def test_opcheck_with_parameters_that_require_a_gradient(case):
    args, kwargs = arguments(case)
    args = ([param.requires_grad_() for param in args[0]], args[1])
    with torch.no_grad():
        results = torch.library.opcheck(operator(case).default, args, kwargs)
    assert set(results.values()) == {"SUCCESS"}


@EACH_CASE
def test_devices_give_the_same_bits_and_read_a_tensor_lr_where_it_is(case, place, monkeypatch):
    """Taken as a number, a learning rate on a GPU would be waited for."""
    args, kwargs = arguments(case)
    there = [[tensor.to(place.device, copy=True) for tensor in some] for some in args]
    states = {k: [t.to(place.device, copy=True) for t in v] for k, v in kwargs.items()}
    operator(case)(*args, **kwargs, lr=0.1)
    monkeypatch.setattr(functional, "backend_for", lambda kind: place.row)
    lr = torch.tensor(0.1, dtype=torch.float64, device=place.device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        operator(case)(*there, **states, lr=lr)
    assert "aten::item" not in {event.key for event in profile.key_averages()}
    ours, others = snapshot(args, kwargs)[0], snapshot(there, states)[0]
    assert all(torch.equal(a, b.cpu()) for a, b in zip(ours, others, strict=True))


@EACH_CASE
def test_version_counters_are_bumped(case):
    args, kwargs = arguments(case)
    tensors, before = snapshot(args, kwargs)
    operator(case)(*args, **kwargs)
    grads = {id(grad) for grad in args[1]}
    for tensor, (_, version) in zip(tensors, before, strict=True):
        assert (tensor._version > version) == (id(tensor) not in grads)


def test_a_backward_through_an_updated_parameter_raises():
    (weight,) = make_params([(4, 4)])
    x = torch.randn(4, 4, requires_grad=True)
    loss = (x @ weight).square().sum()
    with torch.no_grad():
        torch.ops.fusedopt.sgd_([weight], [torch.ones(4, 4)], momentum_buffers=[])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_of_parameters_are_left_alone():
    (param,) = make_params([(5,)])
    kept = param.grad = torch.full((5,), 7.0)
    before = param.detach().clone()
    with torch.no_grad():
        torch.ops.fusedopt.sgd_([param], [torch.ones(5)], momentum_buffers=[], lr=1.0)
    assert param.grad is kept
    assert torch.equal(param.detach(), before - 1)


def test_views_fp32_gradients_complex_numbers_and_no_parameters_at_all():
    flat = torch.ones(12)
    half = torch.ones(6, dtype=torch.bfloat16)
    torch.ops.fusedopt.sgd_(
        [flat[2:6].view(2, 2), flat[6:], half],
        [torch.ones(2, 2).t(), torch.ones(1).expand(6), torch.full((6,), 0.5)],
        momentum_buffers=[],
        lr=0.5,
    )
    assert torch.equal(flat, torch.tensor([1.0] * 2 + [0.5] * 10))
    assert torch.equal(half, torch.full((6,), 0.75, dtype=torch.bfloat16))
    turned = torch.ones(3, dtype=torch.complex64)
    torch.ops.fusedopt.sgd_([turned], [turned * 1j], momentum_buffers=[], lr=1.0, maximize=True)
    assert torch.equal(turned, torch.full((3,), 1 + 1j))
    torch.ops.fusedopt.sgd_([], [], momentum_buffers=[])


def test_meta_tensors_do_nothing():
    weight = torch.ones(3, device="meta")
    torch.ops.fusedopt.sgd_([weight], [weight], momentum_buffers=[])


def test_inference_mode_updates_ordinary_tensors():
    weight, grad = torch.ones(3), torch.ones(3)
    with torch.inference_mode():
        torch.ops.fusedopt.sgd_([weight], [grad], momentum_buffers=[], lr=1.0)
    assert torch.equal(weight, torch.zeros(3))


class Tagged(torch.Tensor):
    """A subclass that is asked before an operation is applied to its memory."""

    asked = ()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.asked += (func,)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_tensor_subclass_is_asked():
    weight = torch.ones(3).as_subclass(Tagged)
    torch.ops.fusedopt.sgd_([weight], [torch.ones(3)], momentum_buffers=[], lr=1.0)
    assert torch.ops.fusedopt.sgd_ in Tagged.asked


def replaced(place, index, value):
    """An edit of valid arguments: one tensor of one list becomes another."""

    def edit(args, kwargs):
        tensors = {"params": args[0], "grads": args[1], **kwargs}[place]
        tensors[index] = value(tensors[index]) if callable(value) else value

    return edit


def keyword(name, value):
    return lambda args, kwargs: kwargs.update({name: value(kwargs) if callable(value) else value})


WRONG = [
    (lambda a, k: a[1].pop(), ValueError, r"adam_: grads has 1 tensors; it must have 2, one for"),
    (keyword("exp_avgs", []), ValueError, r"adam_: exp_avgs has 0 tensors; it must have 2"),
    (
        keyword("max_exp_avg_sqs", lambda kwargs: kwargs["exp_avgs"]),
        ValueError,
        r"max_exp_avg_sqs has 2 tensors; these hyperparameters use no such state; give \[\]",
    ),
    (keyword("amsgrad", True), ValueError, "max_exp_avg_sqs has 0 tensors; it must have 2"),
    (
        replaced("grads", 1, torch.Tensor.to_sparse),
        ValueError,
        r"adam_ cannot update params\[1\] of shape \(37,\): its gradient is sparse; leave it",
    ),
    (replaced("grads", 0, torch.ones(5, 3)), ValueError, "its gradient has another shape"),
    (
        replaced("params", 0, torch.ones(3, 5, dtype=torch.int64)),
        ValueError,
        r"cannot update params\[0\] of shape \(3, 5\): its dtype is Long",
    ),
    (
        replaced("params", 0, torch.ones(1).expand(3, 5)),
        ValueError,
        "several of its elements share one memory location",
    ),
    (
        replaced("exp_avg_sqs", 1, torch.ones(36)),
        ValueError,
        r"exp_avg_sqs\[1\] is torch.float32 of shape \(36,\), and params\[1\] torch.float32 of "
        r"shape \(37,\): a state has another shape; give one made by torch.zeros_like",
    ),
    (replaced("exp_avgs", 0, torch.Tensor.double), ValueError, "its states have several dtypes"),
    (
        replaced("state_steps", 0, torch.tensor(0)),
        ValueError,
        r"state_steps\[0\] is torch.int64 of shape \(\) on cpu; it must be one float32 or float64",
    ),
    (
        lambda args, kwargs: replaced("params", 1, args[0][0].view(-1)[:5])(args, kwargs),
        ValueError,
        r"params\[1\] of shape \(5,\): its gradient has another shape",
    ),
    (
        lambda args, kwargs: kwargs["exp_avgs"].__setitem__(0, kwargs["exp_avg_sqs"][0]),
        ValueError,
        r"params\[0\] share memory, of their own or of their states; give each parameter once",
    ),
    (
        lambda args, kwargs: kwargs["state_steps"].__setitem__(0, kwargs["state_steps"][1]),
        ValueError,
        r"params\[0\] and params\[1\] share memory",
    ),
    (keyword("lr", -1.0), ValueError, "Invalid learning rate: -1.0"),
    (keyword("lr", torch.ones(2)), TypeError, "'lr' is .* must be a number or a tensor of one"),
    (keyword("beta1", 1.0), ValueError, "Invalid beta parameter at index 0: 1.0"),
    (keyword("lr", "fast"), RuntimeError, "Expected a value of type 'float' for argument 'lr'"),
    (keyword("momentum", 0.9), RuntimeError, "Unknown keyword argument 'momentum'"),
    (
        lambda args, kwargs: args[0][0].requires_grad_(),
        RuntimeError,
        r"adam_ has no gradient, and an argument has requires_grad=True; call it under torch.no_gr",
    ),
]


@pytest.mark.parametrize(("edit", "error", "match"), WRONG, ids=range(len(WRONG)))
def test_wrong_arguments_are_named_and_nothing_is_changed(edit, error, match):
    args, kwargs = arguments(ADAM)
    edit(args, kwargs)
    tensors, before = snapshot(args, kwargs)
    with pytest.raises(error, match=match):
        torch.ops.fusedopt.adam_(*args, **kwargs)
    for tensor, (value, version) in zip(tensors, before, strict=True):
        assert torch.equal(tensor.to_dense(), value.to_dense())
        assert tensor._version == version


@EACH_CASE
def test_a_compiled_function_calls_it_in_one_graph(case):
    """What is computed before and after it in the graph sees the memory it writes."""

    def update(params, grads, states, lr):
        grads = [grad * 2 for grad in grads]
        getattr(torch.ops.fusedopt, f"{case.name}_")(params, grads, **states, lr=lr)
        return sum(param.square().sum() for param in params)

    compiled = torch.compile(update, backend="aot_eager", fullgraph=True)
    outcomes = []
    for function in (update, compiled):
        args, states = arguments(case)
        versions = [param._version for param in args[0]]
        sums = [function(*args, states, torch.tensor(0.1 * (i + 1))) for i in range(4)]
        assert all(p._version > v for p, v in zip(args[0], versions, strict=True))
        outcomes.append((sums, args[0], states))
    (sums, params, states), (other_sums, others, other_states) = outcomes
    assert sums == other_sums
    for some, same in ((params, others), *((states[k], other_states[k]) for k in states)):
        assert all(torch.equal(a, b) for a, b in zip(some, same, strict=True))


def test_a_changed_tensor_lr_compiles_nothing_anew():
    args, states = arguments(ADAM)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def update(lr):
        torch.ops.fusedopt.adam_(*args, **states, lr=lr)

    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(4):
            update(torch.tensor(0.1 / (step + 1)))
    assert states["state_steps"][0] == 4


@pytest.mark.slow
@EACH_CASE
def test_inductor_calls_it_on_the_memory_that_it_was_given(case):
    def update(params, grads, states):
        torch.ops.aten.mul_(grads[0], 2)
        getattr(torch.ops.fusedopt, f"{case.name}_")(params, grads, **states, lr=0.1)
        return [param + 1 for param in params]

    outcomes = []
    for function in (update, torch.compile(update, fullgraph=True)):
        args, states = arguments(case)
        pointers = [param.data_ptr() for param in args[0]]
        results = [function(*args, states) for _ in range(3)][-1]
        assert pointers == [param.data_ptr() for param in args[0]]
        outcomes.append([*results, *snapshot(args, states)[0]])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_it_can_be_exported():
    class Update(torch.nn.Module):
        def forward(self, weight, grad, momentum_buffer):
            torch.ops.fusedopt.sgd_(
                [weight], [grad], momentum_buffers=[momentum_buffer], momentum=0.9, lr=0.5
            )
            return weight.sum()

    def tensors():
        return torch.ones(3), torch.ones(3), torch.zeros(3)

    program = torch.export.export(Update(), tensors())
    weight, grad, momentum_buffer = tensors()
    assert program.module()(weight, grad, momentum_buffer) == 1.5
    assert torch.equal(momentum_buffer, torch.ones(3))


def test_its_documentation_can_be_read_and_its_page_runs():
    assert "exp_avgs" in torch.ops.fusedopt.adamw_.__doc__
    page = (Path(__file__).parent.parent / "docs/functional.md").read_text()
    example = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    names = {}
    exec(example, names)
    assert names["step"] == 1
    assert bool((names["weight"] < 1).all())
