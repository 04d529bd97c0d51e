"""What the quick run tries of many combinations: every pair of values, not their product.

A fault that needs three values to meet is left to the long run, which has all combinations. That
the quick run still finds faults is what mutants show.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any

import pytest
import torch
from cases import CASES
from harness import DTYPES


def labelled(value: Any) -> Any:
    """The value as a parameter of pytest, with a readable name."""
    if hasattr(value, "marks"):
        return value
    return pytest.param(value, id=getattr(value, "name", None) or str(value))


def cover(axes: list[list[Any]]) -> set[tuple[int, ...]]:
    """A small set of combinations, as indices, in which every pair of values of two axes meets."""
    rows = [*product(*(range(len(axis)) for axis in axes))]
    pairs = {row: {*combinations(enumerate(row), 2)} for row in rows}
    missing = set().union(*pairs.values())
    chosen = set()
    while missing:
        best = max(rows, key=lambda row: len(pairs[row] & missing))
        missing -= pairs[best]
        chosen.add(best)
    return chosen


def on_a_gpu(value: Any) -> bool:
    """Whether a parameter is one of `devices.needs`."""
    return any(mark.name == "gpu" for mark in value.marks)


def pairwise(**axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrizes by all combinations; all but a cover of the pairs are in the long run.

    Those of a GPU, which is fast, are all in the quick run.
    """
    values = [[labelled(value) for value in axis] for axis in axes.values()]
    everywhere = [[v for v in axis if not on_a_gpu(v)] for axis in values]
    chosen = {
        "-".join(axis[i].id for axis, i in zip(everywhere, row, strict=True))
        for row in cover(everywhere)
    }
    rows = []
    for row in product(*values):
        name = "-".join(value.id for value in row)
        marks = [mark for value in row for mark in value.marks]
        if name not in chosen and not any(map(on_a_gpu, row)):
            marks.append(pytest.mark.slow)
        rows.append(pytest.param(*(value.values[0] for value in row), id=name, marks=marks))
    places = [name for name in axes if name in {"place", "anywhere"}]
    return pytest.mark.parametrize(tuple(axes), rows, indirect=places)


def samples_in(dtypes: Iterable[torch.dtype] = DTYPES) -> pytest.MarkDecorator:
    """Parametrizes by case, sample and dtype: every sample in fp32, the richest in each dtype."""
    return pytest.mark.parametrize(
        ("case", "sample", "dtype"),
        [
            pytest.param(
                case,
                sample,
                dtype,
                id=f"{case.name}-{sample.desc.replace(' ', '_')}-{dtype}",
                marks=[pytest.mark.slow] * (dtype != torch.float32 and sample is not case.richest),
            )
            for case in CASES
            for sample in case.samples
            for dtype in dtypes
        ],
    )
