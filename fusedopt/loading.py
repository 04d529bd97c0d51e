"""Whether a loaded state fits the parameters it is loaded for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from fusedopt.routing import Group, describe

States = Mapping[Tensor, dict[str, Any]]


def by_param(groups: Sequence[Group], state_dict: dict[str, Any]) -> dict[Tensor, dict[str, Any]]:
    """A state dict's states, as they were saved, by the parameters of these groups."""
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in groups)
    return {
        param: state_dict["state"].get(number) or {}
        for number, param in zip(saved, params, strict=False)  # torch says what is wrong with those
    }


def check_steps(groups: Sequence[Group], states: States, class_name: str) -> None:
    """Raises ValueError, naming the parameter, for a state without a step count.

    For before torch's ``__setstate__``, which reads them.
    """
    for where, _, _, state in _states_by_param(groups, states):
        if state.get("step") is None:
            raise _missing(where, "step", state, class_name)


def check_states(
    groups: Sequence[Group],
    states: States,
    names: Callable[[Group], list[str]],
    others: Sequence[str],
    class_name: str,
    *,
    complete: bool,
) -> None:
    """Raises ValueError, naming the parameter, for a state of a wrong shape or a missing one.

    Args:
        groups: The param groups that the state is loaded for.
        states: What is loaded, by parameter.
        names: Those of a group's states.
        others: Names of entries of the parameter's shape that a parameter may have, too.
        class_name: For the message.
        complete: Whether a parameter that has a state has all of ``names``.
    """
    for where, group, param, state in _states_by_param(groups, states):
        for name in [*names(group), *(name for name in others if name in state)]:
            value = state.get(name)
            if value is None:
                if complete and name not in others:
                    raise _missing(where, name, state, class_name)
            elif not isinstance(value, Tensor):
                raise ValueError(
                    f"{where}: {name!r} is {value!r}, wanted a tensor of the parameter's shape; "
                    "load a checkpoint of this model. Nothing was loaded."
                )
            elif value.shape != param.shape:
                raise ValueError(
                    f"{where}: {name!r} has shape {tuple(value.shape)}, wanted the "
                    "parameter's; load a checkpoint of this model. Nothing was loaded."
                )


def _states_by_param(
    groups: Sequence[Group], states: States
) -> Iterator[tuple[str, Group, Tensor, dict[str, Any]]]:
    """What error messages call it, group, parameter and state, where a parameter has a state."""
    number = -1
    for group in groups:
        for index, param in enumerate(group["params"]):
            number += 1
            if state := states.get(param):
                yield f"state of {describe(group, index)} (number {number})", group, param, state


def _missing(where: str, name: str, state: dict[str, Any], class_name: str) -> ValueError:
    return ValueError(
        f"{where}: {name!r} is missing (found {sorted(state)}); load a checkpoint of "
        f"{class_name} with the same flags. Nothing was loaded."
    )
