"""The steps as operators: ``torch.ops.fusedopt.<rule>_``, one for every rule.

An operator is one step without an optimizer object: it updates the parameters and the states it is
given, in place, through the plan and the kernels that the classes use, with the same bits. It is
known to torch.compile, torch.export and fake tensors, so a compiled function may contain it::

    torch.ops.fusedopt.<rule>_(params, grads, *, <state>s..., state_steps, <hyperparameters>...)

The formula of a rule is in its class (``help(fusedopt.AdamW)`` for ``adamw_``).

Args:
    params: Tensors to update; of any shape, floating or complex.
    grads: Their gradients, in the same order and of the same shapes. ``.grad`` is not looked at.
    <state>s: For each state tensor of ``state_dict()`` a list, its name with an "s": ``exp_avgs``,
        ``momentum_buffers``, ``sums``. One tensor a parameter, of its shape, all zero before the
        first step (but for Adagrad's ``initial_accumulator_value``); an empty list where the
        hyperparameters ask for no such state.
    state_steps: One tensor of one element a parameter, float32 or float64, on the CPU or on the
        parameter's device, that counts the steps before this one. Rules that count none do not
        have it.
    is_first_step: Only where there are no counts: the buffers are new, which SGD's momentum takes
        without dampening (default: False).
    <hyperparameters>: As the constructor's, with its defaults; ``betas`` are ``beta1`` and
        ``beta2``. ``lr`` is a number, or in the overload ``tensor_lr`` a tensor of one element,
        whose value is not checked. ``foreach``, ``fused``, ``capturable`` and ``differentiable``
        are not there: nothing would follow from them.

Raises:
    ValueError: A hyperparameter out of range (torch's message); a list of the wrong length; a
        tensor that kernels cannot update (sparse, of another shape, a subclass, sharing memory, on
        a device without kernels), which the message names. Nothing is passed on to torch.optim.
    RuntimeError: Gradients are enabled and an argument requires one; a class of an argument is
        wrong (torch's message).

    Nothing is changed then.

Example:
    >>> import torch, fusedopt
    >>> weight, grad = torch.ones(3), torch.full((3,), 0.5)
    >>> momentum_buffer = torch.zeros(3)
    >>> torch.ops.fusedopt.sgd_(
    ...     [weight], [grad], momentum_buffers=[momentum_buffer], lr=0.1, momentum=0.9
    ... )
    >>> weight
    tensor([0.9500, 0.9500, 0.9500])
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from string import ascii_lowercase
from typing import Any

import torch
from torch import Tensor

from fusedopt._extension import _C
from fusedopt.backends import backend_for
from fusedopt.optimizer import FusedOptimizer
from fusedopt.routing import SHARED_MEMORY, Group, Member, Wanted, sort

_LIBRARY = torch.library.Library("fusedopt", "DEF")

_AFTER_AUTOGRAD = torch._C._after_autograd_keyset


class _Step:
    """The step of a rule, with what an operator needs to know of its class."""

    def __init__(self, optimizer_class: type[FusedOptimizer]) -> None:
        self.optimizer_class = optimizer_class
        self.rule = optimizer_class._rule
        self.name = f"{self.rule}_"
        rule = _C.rules()[self.rule]
        self.has_step = "step" in rule["scalar_states"]
        # In the order in which variants of the rule begin to use them.
        self.states = list(dict.fromkeys(name for names in rule["states"] for name in names))
        # The keywords: those of the constructor that the rule reads. A tuple has one an element,
        # as in torch's functional API. What its class fixes (a flag of the rule) has none.
        constructor = inspect.signature(optimizer_class).parameters
        self.tuples: dict[str, list[str]] = {}
        self.defaults: dict[str, float | bool] = {}
        for key in (name for name in constructor if name in {*rule["hyper"], "maximize"}):
            default = constructor[key].default
            if isinstance(default, tuple):
                self.tuples[key] = [f"{key.removesuffix('s')}{i + 1}" for i in range(len(default))]
                self.defaults.update(zip(self.tuples[key], default, strict=True))
            else:
                self.defaults[key] = default

    def schema(self, overload: str) -> str:
        """The schema of an overload: "" has a number for lr, "tensor_lr" a tensor."""
        mutable = iter(ascii_lowercase)
        lists = [f"{name}s" for name in self.states] + ["state_steps"] * self.has_step
        arguments = [f"Tensor({next(mutable)}!)[] params", "Tensor[] grads", "*"]
        arguments += [f"Tensor({next(mutable)}!)[] {name}" for name in lists]
        if overload:
            arguments.append("Tensor lr")
        if not self.has_step:
            arguments.append("bool is_first_step=False")
        for name, default in self.defaults.items():
            if not (overload and name == "lr"):
                kind = "bool" if isinstance(default, bool) else "float"
                arguments.append(f"{kind} {name}={default}")
        return f"{self.name}{'.' * bool(overload)}{overload}({', '.join(arguments)}) -> ()"

    def __call__(self, params: list[Tensor], grads: list[Tensor], **kwargs: Any) -> None:
        """The kernel of the operator, for every device."""
        group = self._group(kwargs)
        names = _C.state_names(self.rule, group)
        is_first = bool(kwargs.get("is_first_step"))
        self._check_lengths(len(params), grads, names, kwargs)
        # A plan reads a parameter's own `.grad`, so it gets aliases, which share everything of the
        # parameters but that: memory, storage and version counter.
        group["params"] = aliases = [param.detach() for param in params]
        state: dict[Tensor, dict[str, Tensor]] = {}
        for index, (alias, grad) in enumerate(zip(aliases, grads, strict=True)):
            try:
                alias.grad_dtype = grad.dtype
                alias.grad = grad
            except RuntimeError as error:
                raise self._refusal(index, alias, _C.why_not_fused(alias, grad)) from error
            entries = {name: kwargs[f"{name}s"][index] for name in names}
            if self.has_step:
                entries["step"] = kwargs["state_steps"][index]
                self._check_step(index, alias, entries["step"])
            for name, initial, loaded in _C.scalar_states(self.rule, group):
                if name.startswith("_"):
                    value = initial if is_first else loaded
                    entries[name] = torch.full((), value, device=alias.device)
            state[alias] = entries
        numbers = ["step"] * self.has_step
        wanted = Wanted(lambda _: names, lambda alias: alias.dtype, numbers=numbers)
        backends = {kind: backend_for(kind) for kind in {alias.device.type for alias in aliases}}
        members = sort([group], state, lambda alias: backends[alias.device.type], wanted)
        if members.torch:
            raise self._why_refused(members.torch, names, state)
        if shared := _C.overlapping([[step] for step in kwargs.get("state_steps", ())]):
            raise self._shared(shared)
        plan = _C.StepPlan(
            self.rule,
            [group],
            state,
            [(0, alias) for alias in aliases],
            [],
            members.launchers,
            _C.CapturedTables(),
            memory=None,
            new_states=is_first,
        )
        outcome = plan.step([group], state)
        if isinstance(outcome, str):
            raise ValueError(f"{self.name}: the step cannot be prepared: {outcome}")

    def on_group(
        self, group: Group, params: Sequence[Tensor], state: Mapping[Tensor, dict[str, Any]]
    ) -> None:
        """Calls the operator for parameters of an optimizer's group."""
        names = _C.state_names(self.rule, group)
        hyper = {key: group[key] for key in self.defaults if key in group}
        for key, elements in self.tuples.items():
            hyper.update(zip(elements, group[key], strict=True))
        # A schema has tensors for lr alone.
        numbers = {
            key: value if key == "lr" or isinstance(self.defaults[key], bool) else float(value)
            for key, value in hyper.items()
        }
        private = [s for s in _C.scalar_states(self.rule, group) if s[0].startswith("_")]
        parts: dict[bool, list[Tensor]] = {}
        for param in params:
            first = any(state[param][name].item() == initial for name, initial, _ in private)
            parts.setdefault(first, []).append(param)
        for first, part in parts.items():
            lists = {
                f"{name}s": [state[param][name] for param in part] if name in names else []
                for name in self.states
            }
            if self.has_step:
                lists["state_steps"] = [state[param]["step"] for param in part]
            else:
                numbers["is_first_step"] = first
            operator = getattr(torch.ops.fusedopt, self.name)
            operator(part, [param.grad for param in part], **lists, **numbers)
            for param in part:
                for name, _, loaded in private:
                    state[param][name].fill_(loaded)

    def _group(self, kwargs: dict[str, Any]) -> Group:
        """A param group of these hyperparameters, once the constructor finds them valid."""
        hyper = {name: kwargs.get(name, default) for name, default in self.defaults.items()}
        for key, names in self.tuples.items():
            hyper[key] = tuple(hyper.pop(name) for name in names)
        # The constructor would look into a tensor, and so wait for its device.
        tensors = {key: value for key, value in hyper.items() if isinstance(value, Tensor)}
        valid = {**hyper, **{key: self.defaults[key] for key in tensors}}
        return {**self.optimizer_class([torch.empty(0)], **valid).param_groups[0], **tensors}

    def _check_lengths(
        self, count: int, grads: list[Tensor], names: list[str], kwargs: dict[str, Any]
    ) -> None:
        wanted = {"grads": count, **{f"{n}s": count * (n in names) for n in self.states}}
        if self.has_step:
            wanted["state_steps"] = count
        for name, length in wanted.items():
            got = len(grads if name == "grads" else kwargs[name])
            if got == length:
                continue
            if length or not count:
                remedy = f"it must have {count}, one for each of params, in the same order"
            else:
                remedy = "these hyperparameters use no such state; give []"
            raise ValueError(f"{self.name}: {name} has {got} tensors; {remedy}")

    def _refusal(self, index: int, alias: Tensor, reason: str) -> ValueError:
        return ValueError(
            f"{self.name} cannot update params[{index}] of shape {tuple(alias.shape)}: "
            f"{reason}; leave it out and step it with torch.optim"
        )

    def _shared(self, indices: list[int]) -> ValueError:
        listed = " and ".join(f"params[{index}]" for index in indices)
        return ValueError(
            f"{self.name}: {listed} share memory, of their own or of their states; give each "
            "parameter once, with tensors of its own"
        )

    def _why_refused(
        self, refused: list[Member], names: list[str], state: dict[Tensor, dict[str, Tensor]]
    ) -> ValueError:
        """The error for tensors that kernels cannot update, by the first of them."""
        index, alias = refused[0].index, refused[0].param
        if refused[0].reason == SHARED_MEMORY:
            return self._shared([m.index for m in refused if m.reason == SHARED_MEMORY])
        for name in names:
            value = state[alias][name]
            if unfit := _C.why_state_unfit(alias, value):
                return ValueError(
                    f"{self.name}: {name}s[{index}] is {value.dtype} of shape "
                    f"{tuple(value.shape)}, and params[{index}] {alias.dtype} of shape "
                    f"{tuple(alias.shape)}: {unfit}; give one made by "
                    f"torch.zeros_like(params[{index}])"
                )
        return self._refusal(index, alias, refused[0].reason)

    def _check_step(self, index: int, alias: Tensor, step: Tensor) -> None:
        fits = step.numel() == 1 and step.dtype in (torch.float32, torch.float64)
        if not fits or step.device not in (alias.device, torch.device("cpu")):
            raise ValueError(
                f"{self.name}: state_steps[{index}] is {step.dtype} of shape {tuple(step.shape)} "
                f"on {step.device}; it must be one float32 or float64 number on the CPU or on "
                f"{alias.device}; give torch.tensor(0.0) before the first step"
            )


def _requires_grad(values: Sequence[Any]) -> bool:
    lists = (value if isinstance(value, (list, tuple)) else [value] for value in values)
    return any(isinstance(t, Tensor) and t.requires_grad for tensors in lists for t in tensors)


def _below_autograd(name: str, operator: torch._ops.OpOverload) -> Callable[..., None]:
    """The operator's autograd kernel: no gradient flows through a step."""

    def run(keys: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> None:
        # As every operation in place on a leaf. Elsewhere a gradient would be wrong in silence.
        if torch.is_grad_enabled() and _requires_grad([*args, *kwargs.values()]):
            raise RuntimeError(
                f"{name} has no gradient, and an argument has requires_grad=True; call it under "
                "torch.no_grad()"
            )
        with torch._C._AutoDispatchBelowAutograd():
            operator.redispatch(keys & _AFTER_AUTOGRAD, *args, **kwargs)

    return run


def _class_of(rule: str) -> type[FusedOptimizer]:
    """The class that names the rule, in the module that has the rule's name."""
    candidates = vars(importlib.import_module(f"fusedopt.{rule}")).values()
    return next(c for c in candidates if isinstance(c, type) and vars(c).get("_rule") == rule)


def _define(step: _Step) -> None:
    # The overload that takes a tensor comes first: the other would take one too, as a number.
    for overload in ("tensor_lr", ""):
        _LIBRARY.define(step.schema(overload), tags=(torch.Tag.pt2_compliant_tag,))
        name = f"{step.name}{'.' * bool(overload)}{overload}"
        operator = getattr(getattr(torch.ops.fusedopt, step.name), overload or "default")
        _LIBRARY.impl(name, step, "CompositeExplicitAutograd")
        _LIBRARY.impl(name, _below_autograd(step.name, operator), "Autograd", with_keyset=True)
        torch.library.register_fake(f"fusedopt::{name}", lambda *_, **__: None, lib=_LIBRARY)
    packet = getattr(torch.ops.fusedopt, step.name)
    packet.__doc__ = (
        f"One step of fusedopt.{step.optimizer_class.__name__}, in place; see fusedopt.functional."
        f"\n\n    {step.schema('')}\n    {step.schema('tensor_lr')}\n"
    )


_STEPS = {rule: _Step(_class_of(rule)) for rule in _C.rules()}
for _step in _STEPS.values():
    _define(_step)


def step_group(
    rule: str, group: Group, params: Sequence[Tensor], state: Mapping[Tensor, dict[str, Any]]
) -> None:
    """A step of these parameters of an optimizer's group, as a call of the rule's operator."""
    if params:
        _STEPS[rule].on_group(group, params, state)


FusedOptimizer._step_operator = staticmethod(step_group)
