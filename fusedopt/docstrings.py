"""Docstrings of the optimizer classes: what they have in common is written here, once."""

from __future__ import annotations

import inspect
import re
import textwrap

_COMMON = {
    "params": "Parameters, named parameters or param groups; of any shape, floating or complex.",
    "lr": "Learning rate, a number or a tensor of one element.",
    "weight_decay": "L2 penalty, added to the gradient.",
    "foreach": "Validated as torch does; it chooses no arithmetic here.",
    "fused": "Validated as torch does; it chooses no arithmetic here. With it, the kernels read "
    "GradScaler's scale and overflow flag.",
    "maximize": "Ascends.",
    "capturable": "The step can be recorded in a CUDA graph; it counts on the device. On the CPU "
    "it is left to torch.optim.",
    "differentiable": "Leaves the step to torch.optim's autograd-aware code.",
}
_RAISES = """\
Raises:
    ValueError, RuntimeError: As torch's; and see `FusedOptimizer` for ours.
"""
_ARGS = re.compile(r"^Args:\n((?:    .*\n)*)", re.MULTILINE)


def complete(own: str, base: str, signature: inspect.Signature) -> str:
    """A class's docstring with all arguments of its constructor, and their defaults.

    Args:
        own: The class's docstring; "Args:" describes those that are its alone.
        base: The docstring that describes those of `FusedOptimizer`.
        signature: The constructor's, without ``self``.
    """
    own = inspect.cleandoc(own)
    described = {**_COMMON, **_arguments(inspect.cleandoc(base)), **_arguments(own)}
    lines = [_entry(p, described.get(p.name, "As torch's.")) for p in signature.parameters.values()]
    section = "\n".join(["Args:", *lines, "", _RAISES])
    own += "\n"
    args = _ARGS.search(own)
    start, end = args.span() if args else (len(own), len(own))
    return f"{own[:start]}{section}{own[end:]}"


def _arguments(docstring: str) -> dict[str, str]:
    """The entries of a docstring's "Args:"."""
    found = _ARGS.search(docstring)
    entries = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", found[1] if found else "", re.M)
    return {name: " ".join(text.split()) for name, text in entries}


def _entry(parameter: inspect.Parameter, text: str) -> str:
    if parameter.default is not inspect.Parameter.empty:
        text = f"{text.rstrip('.')} (default: {parameter.default!r})."
    return textwrap.fill(
        f"{parameter.name}: {text}", 92, initial_indent=" " * 4, subsequent_indent=" " * 8
    )
