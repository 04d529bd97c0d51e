"""Drop-in: what programs do with an optimizer besides stepping it, beside torch.optim."""

import collections
import copy
import inspect
import logging
import re

import numpy as np
import pytest
import torch
from cases import CASES, case_samples
from harness import assert_same, make_params, run, set_grads

import fusedopt

EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@EACH_CASE
def test_signature_is_torchs_with_ours_after_it(case):
    theirs = inspect.signature(case.torch_class).parameters
    for given in (inspect.signature(case.fused()), inspect.signature(case.fused().__init__)):
        parameters = {name: p for name, p in given.parameters.items() if name != "self"}
        ours = ["backend", "state_dtype", "max_grad_norm", "skip_nonfinite", "ema_decay"]
        ours += ["zero_grads"]
        ours += [f"accumulation_{what}" for what in ("steps", "reduction", "dtype")]
        ours += ["norm_group"]
        assert list(parameters) == [*theirs, *ours]
        for name, parameter in theirs.items():
            assert parameters[name].kind == parameter.kind
            assert parameters[name].default == parameter.default
        assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in ours)
    assert list(inspect.signature(case.fused()(make_params()).step).parameters) == ["closure"]


@EACH_CASE
def test_help_describes_every_argument_once_with_its_default(case):
    text = " ".join(inspect.getdoc(case.fused()).split("Raises:")[0].split())
    for name, parameter in inspect.signature(case.fused()).parameters.items():
        (described,) = re.findall(rf" {name}: (.*?)(?= \w+: [A-Z\"t]|$)", text)
        assert "As torch's." not in described, f"{name} is not described"
        if parameter.default is not inspect.Parameter.empty:
            assert described.endswith(f"(default: {parameter.default!r})."), described


@EACH_CASE
def test_classes_are_torchs(case):
    optimizer = case.fused()(make_params())
    assert isinstance(optimizer, case.torch_class)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert type(optimizer).__name__ == case.torch_class.__name__
    for base in case.torch_class.__mro__:  # AdamW is an Adam here as there
        if base.__module__.startswith("torch.optim") and hasattr(fusedopt, base.__name__):
            assert isinstance(optimizer, getattr(fusedopt, base.__name__))


@pytest.mark.parametrize(("case", "sample"), case_samples())
def test_groups_defaults_and_repr_are_torchs(case, sample):
    kwargs = case.kwargs(sample)
    ours, theirs = case.fused()(make_params(), **kwargs), case.torch_class(make_params(), **kwargs)
    assert ours.defaults.keys() == theirs.defaults.keys()
    assert ours.param_groups[0].keys() == theirs.param_groups[0].keys()
    assert repr(ours) == repr(theirs)


INVALID = [
    ("SGD", {"lr": -1.0}),
    ("SGD", {"momentum": -0.5}),
    ("SGD", {"weight_decay": -0.5}),
    ("SGD", {"nesterov": True}),
    ("SGD", {"momentum": 0.5, "dampening": 0.5, "nesterov": True}),
    ("SGD", {"lr": torch.tensor([0.1, 0.2])}),
    ("SGD", {"fused": True, "foreach": True}),
    ("Adagrad", {"lr_decay": -0.5}),
    ("Adagrad", {"initial_accumulator_value": -1.0}),
    ("Adagrad", {"eps": -1.0}),
    ("Adagrad", {"fused": True, "differentiable": True}),
    ("RMSprop", {"momentum": -1.0}),
    ("RMSprop", {"alpha": -1.0}),
    ("RMSprop", {"eps": -1.0}),
    ("Adam", {"betas": (1.0, 0.0)}),
    ("Adam", {"betas": (0.0, 1.0)}),
    ("Adam", {"betas": (0.9, torch.tensor(0.99))}),
    ("Adam", {"weight_decay": -1}),
    ("Adam", {"lr": torch.tensor(0.001), "foreach": True}),
    ("Adam", {"fused": True, "differentiable": True}),
    ("AdamW", {"lr": -1.0}),
    ("AdamW", {"fused": True, "foreach": True}),
    ("AdamW", {"no_such_argument": 1}),
]


@pytest.mark.parametrize(("name", "kwargs"), INVALID, ids=lambda value: str(value)[:40])
def test_wrong_hyperparameters_give_torchs_own_errors(name, kwargs):
    with pytest.raises(Exception) as theirs:  # noqa: PT011 - whichever torch raises
        getattr(torch.optim, name)(make_params(), **kwargs)
    with pytest.raises(type(theirs.value)) as ours:
        getattr(fusedopt, name)(make_params(), **kwargs)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("params", [torch.zeros(3), [], ["x"], [{"lr": 1.0}], [{"params": {1}}]])
def test_wrong_params_give_torchs_own_errors(params):
    with pytest.raises(Exception) as theirs:  # noqa: PT011 - whichever torch raises
        torch.optim.SGD(copy.deepcopy(params))
    with pytest.raises(type(theirs.value)) as ours:
        fusedopt.SGD(copy.deepcopy(params))
    assert str(ours.value) == str(theirs.value)


def test_closure_runs_with_gradients_and_its_loss_is_returned():
    (param,) = make_params([(3,)])
    optimizer = fusedopt.SGD([param], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        before = param.square().sum()
        assert optimizer.step(closure) == before
    assert param.square().sum() < before


@EACH_CASE
def test_sparse_gradients_take_torchs_path_alone(case, caplog):
    """One sparse embedding is torch's; the rest of the model stays with the kernels."""
    outcomes = []
    for optimizer_class in (case.fused(), case.torch_class):
        params = make_params([(10, 3), (7,)])
        optimizer = optimizer_class(params, lr=0.1)
        try:
            for step in range(3):
                set_grads(params, step)
                params[0].grad = params[0].grad.to_sparse()
                with caplog.at_level(logging.WARNING, logger="fusedopt"):
                    optimizer.step()
            outcomes.append([p.detach() for p in params])
        except RuntimeError as error:
            outcomes.append(str(error))
        if optimizer_class is case.fused():
            routes = optimizer.routes()
            assert [route.backend for route in routes] == ["torch", "cpu"]
            assert "sparse" in routes[0].reason
            assert [r.getMessage().count("1 of 2 parameters") for r in caplog.records] == [1]
    if isinstance(outcomes[1], str):
        assert outcomes[0] == outcomes[1]
    else:
        for ours, theirs in zip(*outcomes, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_failing_torch_part_leaves_the_rest_untouched():
    params = make_params([(10, 3), (7,)])
    optimizer = fusedopt.Adam(params)
    set_grads(params, 0)
    params[0].grad = params[0].grad.to_sparse()
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert params[1] not in optimizer.state
    params[0].grad = None
    optimizer.step()
    assert optimizer.state[params[1]]["step"] == 1


@EACH_CASE
def test_differentiable_is_torchs(case):
    outcomes = []
    for optimizer_class in (case.fused(), case.torch_class):
        (leaf,) = make_params([(5,)])
        param = leaf.clone()
        optimizer = optimizer_class([param], lr=0.1, differentiable=True)
        param.grad = leaf * 2 + 1
        optimizer.step()
        param.sum().backward()
        outcomes.append((param.detach(), leaf.grad))
    for ours, theirs in zip(*outcomes, strict=True):
        assert torch.equal(ours, theirs)


def test_routes_name_every_parameter():
    named = [("weight", make_params([(2, 3)])[0]), ("bias", make_params([(3,)])[0])]
    optimizer = fusedopt.Adam(named)
    routes = optimizer.routes()
    assert [(r.group, r.index, r.name, r.shape, r.backend) for r in routes] == [
        (0, 0, "weight", (2, 3), "cpu"),
        (0, 1, "bias", (3,), "cpu"),
    ]
    assert not optimizer.state, "asking creates no state"


class Tagged(torch.Tensor):
    """A subclass that could give operations another meaning."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


def test_tensor_subclasses_take_torchs_path():
    param = torch.ones(4).as_subclass(Tagged).requires_grad_()
    optimizer = fusedopt.SGD([param], lr=0.5)
    param.grad = torch.ones(4)
    assert optimizer.routes()[0].reason == "the parameter is a tensor subclass"
    optimizer.step()
    assert torch.equal(param.detach().as_subclass(torch.Tensor), torch.full((4,), 0.5))


def frozen(value):
    return torch.nn.Parameter(value, requires_grad=False)


FROZEN = {
    "int8": lambda: frozen(torch.ones(3, dtype=torch.int8)),
    "uint8": lambda: frozen(torch.ones(3, dtype=torch.uint8)),
    "bool": lambda: frozen(torch.ones(3, dtype=torch.bool)),
    "float8": lambda: frozen(torch.ones(3).to(torch.float8_e4m3fn)),
    "complex32": lambda: frozen(torch.ones(3, dtype=torch.complex32)),
    "sparse": lambda: frozen(torch.ones(3).to_sparse()),
    "meta": lambda: frozen(torch.ones(3, device="meta")),
    "expanded": lambda: frozen(torch.ones(1).expand(3)),
    "bf16 subclass": lambda: frozen(torch.ones(3, dtype=torch.bfloat16).as_subclass(Tagged)),
}
ASKED = (
    {},
    {"max_grad_norm": 1.0},
    {"skip_nonfinite": True, "ema_decay": 0.9},
    {"accumulation_steps": 2},
    {"backend": "cpu"},
    {"state_dtype": torch.float32},
)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("make", FROZEN.values(), ids=FROZEN)
def test_frozen_parameters_of_any_kind_are_left_alone(make, caplog):
    """Models of quantized weights are handed over whole; who would step those does not matter."""
    for options in ASKED:
        weight, waits = torch.nn.Parameter(torch.ones(3)), make()
        optimizer = fusedopt.AdamW([weight, waits], lr=0.1, **options)
        later = torch.nn.Parameter(torch.ones(2))
        optimizer.add_param_group({"params": [make(), later]})
        for _ in range(options.get("accumulation_steps", 1)):
            weight.grad, later.grad = torch.ones(3), torch.ones(2)
            optimizer.step()
        assert (weight < 1).all()
        assert (later < 1).all()
        assert optimizer.state.keys() == {weight, later}
        optimizer.load_state_dict(optimizer.state_dict())
        assert len(optimizer.routes()) == 4
    assert not caplog.records
    optimizer, before = fusedopt.SGD([weight, waits], lr=0.1), weight.detach().clone()
    with fusedopt.step_in_backward(optimizer):
        weight.sum().backward()
    assert (weight < before).all()


@pytest.mark.parametrize("options", ASKED[1:], ids=str)
def test_a_parameter_that_waits_is_judged_when_it_has_a_gradient(options):
    weight, waits = torch.nn.Parameter(torch.ones(3)), FROZEN["bf16 subclass"]()
    weight.grad = torch.ones(3)
    optimizer = fusedopt.AdamW([weight, waits], lr=0.1, **options)
    optimizer.step()
    waits.requires_grad_().grad = torch.ones(3, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"cannot .* parameter 1 .*: the parameter is a tensor"):
        optimizer.step()
    weight, waits = torch.nn.Parameter(torch.ones(3)), FROZEN["bf16 subclass"]()
    optimizer = fusedopt.AdamW([weight, waits], lr=0.5)
    for _ in range(2):
        weight.grad = torch.ones(3)
        optimizer.step()
        assert len(optimizer.state) == 1
    waits.requires_grad_().grad = torch.ones(3, dtype=torch.bfloat16)
    optimizer.step()
    assert (waits.as_subclass(torch.Tensor) < 1).all()


def test_fused_and_foreach_choose_no_arithmetic():
    results = []
    for flags in ({}, {"fused": True}, {"foreach": True}, {"foreach": False, "fused": False}):
        params = make_params()
        results.append((params, run(fusedopt.AdamW, params, {"lr": 0.1, **flags})))
        assert all(r.backend == "cpu" for r in results[-1][1].routes())
    for other in results[1:]:
        assert_same(results[0], other)


NUMBERS = {
    "np.float32": np.float32,
    "np.float64": np.float64,
    "np.float16": np.float16,
    "np.array": np.array,
    "0-dim tensor": torch.tensor,
    "0-dim float64": lambda value: torch.tensor(value, dtype=torch.float64),
}


@EACH_CASE
@pytest.mark.parametrize("convert", NUMBERS.values(), ids=NUMBERS)
def test_hyperparameters_may_be_numbers_of_any_kind(case, convert):
    """0.25 in each: what torch takes, and what it fails with in the arithmetic."""
    theirs = case.torch_class(make_params()).param_groups[0]
    for name in [n for n, value in theirs.items() if type(value) is float]:
        ends = []
        for value in (0.25, convert(0.25)):
            params = make_params([(7,)])
            optimizer = case.fused()(params, lr=0.1)
            for step in range(2):
                set_grads(params, step)
                optimizer.step()
                optimizer.param_groups[0][name] = value
            ends.append(params)
        assert all(map(torch.equal, *ends)), name


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("length", [0, 1, 3])
def test_sequences_have_their_length_as_with_torch(name, length):
    for container in (tuple, list, torch.tensor):
        for optim in (torch.optim, fusedopt):
            params = make_params([(3,)])
            optimizer = getattr(optim, name)(params)
            optimizer.param_groups[0]["betas"] = container([0.9, 0.99, 0.5][:length])
            set_grads(params, 0)
            with pytest.raises(ValueError, match=r"unpack|it must have 2 entries"):
                optimizer.step()
    params = make_params([(3,)])
    set_grads(params, 0)
    optimizer = getattr(fusedopt, name)(params, betas=(0.9, 0.99, 0.5))
    with pytest.raises(ValueError, match=r"'betas' is \(0.9, 0.99, 0.5\); it must have 2 entries"):
        optimizer.step()


CONTAINERS = {
    "tuple": tuple,
    "deque": collections.deque,
    "generator": iter,
    "dict": dict.fromkeys,
    "keys": lambda params: dict.fromkeys(params).keys(),
    "ParameterList": torch.nn.ParameterList,
}


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_params_may_be_any_iterable_as_with_torch(container):
    """In the constructor, in a group and in place of a group's list."""
    ends = []
    for optim in (torch.optim, fusedopt):
        params = make_params([(3,), (2, 5)])
        first = optim.SGD(container(params), lr=0.1)
        second = optim.SGD([{"params": container(params)}], lr=0.1)
        third = optim.SGD(params, lr=0.1)
        for step, optimizer in enumerate([first, second, third, third]):
            set_grads(params, step)
            if step == 3:
                optimizer.param_groups[0]["params"] = container(params)
            optimizer.step()
        ends.append(params)
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@EACH_CASE
def test_states_that_torch_sets_and_loads_are_taken(case):
    """Other classes' states, parts, more keys than there are parameters, entries of nobody's."""

    def on_a_new_object(optimizer, cls, torch_class):
        theirs = torch_class(optimizer.param_groups[0]["params"], lr=0.1)
        theirs.load_state_dict(optimizer.state_dict())
        new = cls.__new__(cls)
        new.__setstate__(theirs.__getstate__())
        return new

    def groups_only(optimizer, *_):
        optimizer.__setstate__({"param_groups": tuple(dict(g) for g in optimizer.param_groups)})
        return optimizer

    def of_more(optimizer, *_):
        saved = optimizer.state_dict()
        saved["param_groups"] = tuple(
            {**g, "params": tuple(g["params"])} for g in saved["param_groups"]
        )
        saved["state"] = {
            **{number: {**state, "note": "x"} for number, state in saved["state"].items()},
            "global": 5,
        }
        optimizer.load_state_dict({**saved, "more": 1})
        optimizer.state["epoch"] = 3
        return optimizer

    for change in (on_a_new_object, groups_only, of_more):
        ends = []
        for cls in (case.torch_class, case.fused()):
            params = make_params([(3,), (2, 5)])
            optimizer = cls(params, lr=0.1)
            for step in range(3):
                set_grads(params, step)
                optimizer.step()
                if step == 1:
                    optimizer = change(optimizer, cls, case.torch_class)
            assert copy.deepcopy(optimizer).state_dict()
            ends.append(params)
        for ours, theirs in zip(*ends, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@EACH_CASE
def test_missing_hyperparameter_and_wrong_type_in_a_group(case):
    params = make_params([(3,)])
    optimizer = case.fused()(params)
    set_grads(params, 0)
    optimizer.step()
    before = params[0].detach().clone()
    optimizer.param_groups[0]["lr"] = "fast"
    with pytest.raises(TypeError, match="'lr' is 'fast'; it must be a number"):
        optimizer.step()
    del optimizer.param_groups[0]["lr"]
    with pytest.raises(KeyError, match="lr"):
        optimizer.step()
    assert torch.equal(params[0].detach(), before)
