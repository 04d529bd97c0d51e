"""The float64 oracle's golden cases for the C++ tests, which see no torch.

``python tests/oracle.py --write FILE`` writes the formulas of cases.py at all their samples. The
file is lines of words separated by one space; real numbers are C99 hexadecimal floats, so nothing
is lost. Lines that start with ``#`` are comments. A case is these lines, in this order::

    case <name>
    rule <name in csrc/rules/all.h>
    hyper <count> <value of every field of the rule's Hyper, in order>
    step <step, from 1> first <1 if the states were created for this step, else 0>
    states <count> <names, in the order of the rule's states(variant)>
    elements <count>
    <param grad state...  param state...  bound state...  bound state...>

with one line an element: the inputs (exact in float32), the expected new parameter and states, and
how far each may be off when the rule runs on ``float``, then the same on ``double``
(tests/tolerances.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import CASES, Case
from tolerances import absolute_bounds

STEPS = (1, 2, 10, 1000)
PARAMS = (0.0, 1.0, -1.5, 0.3, -2e-3, 1e4, -1e-6, 7.0)
GRADS = (1.0, -0.5, 3e4, -1e-6, 0.02, -3.0, 1e-12, 0.0)


def hypers(case: Case) -> Iterator[tuple[str, dict[str, Any]]]:
    """Keywords of the formula: every sample of numbers, with weight decay and without."""
    seen = []
    for sample in case.samples:
        if any(isinstance(v, torch.Tensor) for v in torch.utils._pytree.tree_leaves(sample.kwargs)):
            continue
        for weight_decay in (0.0, 0.1):
            hyper = {**case.defaults, **case.hyper(sample.kwargs), "weight_decay": weight_decay}
            del hyper["maximize"]  # the driver's, for all rules
            if hyper not in seen:
                seen.append(hyper)
                name = sample.desc.replace(" ", "_")
                yield f"{case.name}/{name}", hyper


def fields(hyper: dict[str, Any]) -> list[float]:
    """The values of the C++ Hyper, a double a field."""
    values = [v if isinstance(v, tuple) else (v,) for v in hyper.values()]
    return [float(number) for value in values for number in value]


def golden_lines() -> Iterator[str]:
    """The lines of the golden file (format: the module's docstring)."""
    pairs = [(p, g) for p in PARAMS for g in GRADS]
    param, grad = np.array(pairs, np.float32).T.astype(np.float64)
    rng = np.random.default_rng(len(grad))
    history = grad + rng.standard_normal(len(grad))
    spread = rng.uniform(0.5, 2.0, len(grad))
    for case in CASES:
        for name, hyper in hypers(case):
            for step in STEPS:
                first = step == 1
                before = {
                    state: np.zeros_like(grad)
                    if first
                    else kept.earlier(history, spread).astype(np.float32).astype(np.float64)
                    for state, kept in case.states.items()
                }
                # torch has no state yet that the first step makes.
                given = {} if first and case.lazy_state else before
                after, states = case.formula(param, grad, given, step, **hyper)
                columns = [param, grad, *(before[n] for n in states), after, *states.values()]
                for dtype in ("float32", "float64"):
                    bounds = absolute_bounds(case, param, grad, given, step, hyper, dtype)
                    columns += [bounds[n] for n in ("param", *states)]
                values = fields(hyper)
                yield f"case {name}/step={step}/weight_decay={hyper['weight_decay']}"
                yield f"rule {case.name}"
                yield " ".join(["hyper", str(len(values)), *map(float.hex, values)])
                yield f"step {step} first {int(first)}"
                yield " ".join(["states", str(len(states)), *states])
                yield f"elements {len(param)}"
                for row in zip(*columns, strict=True):
                    yield " ".join(float(x).hex() for x in row)


def main() -> None:
    """Writes the golden file."""
    parser = argparse.ArgumentParser(description="Write golden cases for the C++ rule test.")
    parser.add_argument("--write", type=Path, required=True, metavar="FILE")
    path = parser.parse_args().write
    path.write_text("\n".join(["# Written by tests/oracle.py", *golden_lines()]) + "\n")


if __name__ == "__main__":
    main()
