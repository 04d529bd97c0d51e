"""Whether a loaded state fits the parameters it was loaded for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fusedopt.onepass import ACCUMULATOR, AVERAGE
from fusedopt.routing import Group, describe

if TYPE_CHECKING:
    from fusedopt.optimizer import FusedOptimizer


def check_loaded_steps(optimizer: FusedOptimizer, loaded: dict[str, Any]) -> None:
    """Raises ValueError, naming the parameter, for a loaded state without the step that it needs.

    For before torch's ``__setstate__``, which reads the step counts.
    """
    if optimizer._has_step:
        for where, _, _, state in _states_by_param(loaded["param_groups"], loaded["state"]):
            if state.get("step") is None:
                raise _missing(optimizer, where, "step", state)


def check_loaded_state(optimizer: FusedOptimizer) -> None:
    """Raises ValueError, naming the parameter, for a state of a wrong shape or a missing one."""
    for where, group, param, state in _states_by_param(optimizer.param_groups, optimizer.state):
        present = [name for name in (ACCUMULATOR, AVERAGE) if name in state]
        for name in [*optimizer._state_names(group), *present]:
            value = state.get(name)
            if value is None:
                if optimizer._has_step and name not in present:
                    raise _missing(optimizer, where, name, state)
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
    param_groups: list[Group], states: dict[Tensor, dict[str, Any]]
) -> Iterator[tuple[str, Group, Tensor, dict[str, Any]]]:
    """What error messages call it, group, parameter and state, where a parameter has a state."""
    number = -1
    for group in param_groups:
        for index, param in enumerate(group["params"]):
            number += 1
            if state := states.get(param):
                yield f"state of {describe(group, index)} (number {number})", group, param, state


def _missing(optimizer: FusedOptimizer, where: str, name: str, state: dict[str, Any]) -> ValueError:
    return ValueError(
        f"{where}: {name!r} is missing (found {sorted(state)}); load a checkpoint of "
        f"{type(optimizer).__name__} with the same flags. Nothing was loaded."
    )
