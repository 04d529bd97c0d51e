"""Two short jobs: ``parity``, whether steps do torch's arithmetic, and ``list``, who is here."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from . import machine, optimizers, parity, peers, providers, step, workloads
from .options import add_names, file
from .workloads import WORKLOADS

Maker = Callable[..., Any]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``parity``."""
    parser.add_argument(
        "classes",
        nargs="*",
        type=optimizer_class,
        metavar="MODULE:CLASS",
        help="optimizer classes of any library, constructed as torch's are; without them, the "
        "providers that are installed",
    )
    parser.add_argument(
        "--as",
        dest="reference",
        choices=optimizers.names(),
        help="which of torch's the classes are to be (default: the one of their name)",
    )
    add_names(parser, "--optimizers", "optimizer", optimizers.names())
    add_names(parser, "--providers", "provider", providers.PROVIDERS, "who is installed")
    add_names(parser, "--dtype", "dtype", step.DTYPES, ["float32"])
    parser.add_argument("--device", choices=machine.devices(), default="cpu")
    parser.add_argument("--json", type=file, metavar="FILE", help="write the rows to this file")


def optimizer_class(text: str) -> tuple[str, Any]:
    """Parser of an import path of a class."""
    try:
        with peers.quiet():
            return text, peers.imported(text)
    except Exception as error:  # somebody else's code: it may raise anything
        raise argparse.ArgumentTypeError(
            f"cannot import {text!r} ({type(error).__name__}: {error}); wanted: module:Class"
        ) from None


def makers(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> list[tuple[str, str, Maker]]:
    """(who, torch's name, maker) of everything that is to be compared."""
    found: list[tuple[str, str, Maker]] = []
    for path, cls in options.classes:
        name = options.reference or cls.__name__
        if name not in optimizers.names() or not hasattr(torch.optim, name):
            parser.error(
                f"argument --as: torch.optim has no {name}, of which {path} could be a copy; "
                f"wanted: one of {', '.join(optimizers.names())}"
            )
        found.append((path, name, partial(peers.make, cls, name)))
    if found and options.providers is None:
        return [("torch default", found[0][1], getattr(torch.optim, found[0][1])), *found]
    for name in options.providers or providers.usual(options.device):
        provider = providers.PROVIDERS[name]
        if isinstance(provider, providers.FloorProvider):
            continue
        for optimizer in options.optimizers:
            if not provider.unavailable(optimizer, torch.float32, options.device):
                found.append((provider.title, optimizer, partial(provider.optimizer, optimizer)))
    return found


def run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Compares, prints the table, and tells by the exit code whether classes that were named agree.

    A provider that differs is shown and no failure: what it computes is its library's business.
    """
    from . import report, tables  # need rich, which the command line has just found

    chosen = makers(parser, options)
    dtypes = [step.DTYPES[name] for name in options.dtype]
    console = report.make_console()
    rows = list(parity.measure(chosen, dtypes, options.device))
    console.print(tables.parity_table(rows))
    for line in tables.parity_notes(rows):
        console.print(line, soft_wrap=True, markup=False)
    if options.json:
        report.write_json(options.json, {"machine": machine.describe(), "parity": {"rows": rows}})
    named = {path for path, _ in options.classes}
    return int(any(row["who"] in named and not row["same"] for row in rows))


def add_list_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``list``."""
    parser.add_argument("--device", choices=machine.devices(), default="cpu")


def run_list(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Prints workloads, and providers with what they can step here or why they cannot."""
    from . import report, tables  # need rich, which the command line has just found

    console = report.make_console()
    console.print(tables.workload_table(list(WORKLOADS.values()), workloads.SWEEP))
    console.print(tables.provider_table(availability(options.device)))
    return 0


def availability(device: str) -> list[tuple[providers.AnyProvider, list[str], list[str]]]:
    """By provider: the optimizers it steps on `device`, and why it does not step the others."""
    found = []
    for provider in providers.PROVIDERS.values():
        # Without the optimizer's name: one reason for all is said once.
        reasons = {
            name: provider.unavailable(name, torch.float32, device).replace(f".{name}:", ":")
            for name in optimizers.names()
        }
        able: Sequence[str] = [name for name, reason in reasons.items() if not reason]
        found.append((provider, list(able), list(dict.fromkeys(filter(None, reasons.values())))))
    return found
