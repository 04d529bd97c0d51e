"""What the command line takes: parsers of values, and the options that jobs share."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from . import machine, optimizers, pipeline, step, timing, train, workloads
from .providers import PROVIDERS

DEFAULT_OUT = "build/bench"
STANDARD = [name for name, workload in workloads.WORKLOADS.items() if workload.standard]
# What has options: a parser or a group of one.
Options = argparse.ArgumentParser | argparse._ArgumentGroup


def one_of(what: str, accepted: Iterable[str]) -> Callable[[str], list[str]]:
    """Parser of a comma-separated list of names; ``all`` stands for every one of them."""
    wanted = list(accepted)

    def parse(text: str) -> list[str]:
        names = wanted if text == "all" else [name.strip() for name in text.split(",")]
        for name in names:
            if name not in wanted:
                raise argparse.ArgumentTypeError(
                    f"unknown {what} {name!r}; wanted: a comma-separated list of "
                    f"{', '.join(wanted)}, or all"
                )
        return list(dict.fromkeys(names))

    return parse


def at_least(minimum: float, kind: type[int] | type[float] = int) -> Callable[[str], float]:
    """Parser of a number that is not smaller than `minimum`."""
    noun = "a whole number" if kind is int else "a number"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not value >= minimum:
            raise argparse.ArgumentTypeError(f"got {text!r}; wanted: {noun}, at least {minimum}")
        return value

    return parse


def directory(text: str) -> Path:
    """Parser of a directory that can be written to; it is made if it is not there."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"cannot write to {text!r} ({error.strerror}); wanted: a directory; "
            "name one that you may write to"
        ) from None
    return path


def file(text: str) -> Path:
    """Parser of a file that can be written."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a directory; wanted: the name of a file")
    directory(str(path.parent))
    return path


def add_names(
    group: Options,
    flag: str,
    what: str,
    accepted: Iterable[str],
    default: str | list[str] = "all",
) -> None:
    """Adds an option that takes names; absent, it is those in `default`, or all, or None."""
    names = list(accepted)
    text = default if isinstance(default, str) else ", ".join(default)
    group.add_argument(
        flag,
        type=one_of(what, names),
        default=None if isinstance(default, str) and default != "all" else text.replace(" ", ""),
        metavar="LIST",
        help=f"all, or a comma-separated list of {', '.join(names)} (default: {text})",
    )


def add_number(group: Options, flag: str, minimum: int, default: int, text: str) -> None:
    """Adds an option that takes a whole number."""
    help_text = f"{text} (default: {default})"
    group.add_argument(flag, type=at_least(minimum), default=default, metavar="N", help=help_text)


def unit_fraction(text: str) -> float:
    """Parser of a number above 0 and not above 1."""
    value = at_least(0, float)(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; wanted: a number above 0, at most 1")
    return value


def model(text: str) -> workloads.Workload:
    """Parser of ``module:factory``."""
    try:
        return workloads.of_model(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_common(parser: argparse.ArgumentParser, default: str | list[str]) -> None:
    """Adds the options of every job; `default` are its optimizers."""
    add_names(parser, "--optimizers", "optimizer", optimizers.names(), default)
    parser.add_argument(
        "--threads",
        type=at_least(1),
        metavar="N",
        help="threads torch and fusedopt use (default: 1 to train, as the networks are small; "
        f"torch's choice, {torch.get_num_threads()} here, to time the step)",
    )
    help_text = "write everything measured to this file"
    parser.add_argument("--json", type=file, metavar="FILE", help=help_text)


def add_train(group: Options) -> None:
    """Adds the options of the digits job."""
    add_names(group, "--models", "model", train.MODELS)
    add_number(group, "--epochs", 1, 30, "passes over the training images")
    add_number(group, "--seed", 0, 0, "of the initial weights and the order of the batches")
    add_out(group, "loss_curves.png")


def add_out(group: Options, picture: str) -> None:
    """Adds the folder of a job's picture."""
    group.add_argument(
        "--out",
        type=directory,
        default=DEFAULT_OUT,
        metavar="DIR",
        help=f"where {picture} goes (default: {DEFAULT_OUT})",
    )


def add_step(group: Options) -> None:
    """Adds the options of the step job."""
    add_race(group, STANDARD, "a step")
    add_names(
        group, "--providers", "provider", PROVIDERS,
        "torch's, fusedopt, its floor, and the libraries that are installed: see `list`",
    )  # fmt: skip
    group.add_argument(
        "--baseline",
        choices=[step.BEST, *PROVIDERS],
        default=step.BEST,
        metavar="NAME",
        help="whom the others' speed is compared with, round by round: a provider, or "
        f"{step.BEST}, the fastest of torch's in each row (default)",
    )
    group.add_argument(
        "--memory",
        choices=("one", "all", "none"),
        default="one",
        help="whose peak memory is measured, each provider in a fresh process: one optimizer's "
        "(default), all, or none",
    )
    group.add_argument(
        "--skip-parity",
        action="store_true",
        help="do not check first that every provider does torch's arithmetic",
    )
    group.add_argument("--csv", type=file, metavar="FILE", help="write the table to this file")
    add_fail_below(group)
    default = "float32, and on huge and many also AdamW in bfloat16"
    add_names(group, "--dtype", "dtype", step.DTYPES, default)


def add_fail_below(group: Options) -> None:
    """Adds the gate against regressions."""
    group.add_argument(
        "--fail-below",
        type=at_least(0, float),
        metavar="X",
        help="exit with 1, and name the rows, if fusedopt is less than X times as fast as the "
        "baseline",
    )


def add_pipeline(group: Options) -> None:
    """Adds the options of the pipeline job."""
    add_race(group, pipeline.STANDARD, "a chain or call")
    add_names(group, "--chains", "chain", pipeline.CHAINS)
    add_out(group, "pipeline.png")


def add_race(group: Options, standard: Sequence[str], what: str) -> None:
    """Adds the options of a job that times `what`, on the workloads `standard` by default."""
    # None, not the names: what is asked for by name and does not fit into memory is an error.
    default = f"of {', '.join(standard)} those that fit into memory"
    add_names(group, "--workloads", "workload", workloads.choices(), default)
    group.add_argument(
        "--model",
        type=model,
        metavar="MODULE:FACTORY",
        help="a workload of your own: the parameters of the model this makes",
    )
    group.add_argument(
        "--scale",
        type=unit_fraction,
        default=1.0,
        metavar="X",
        help="shrink the depth of gpt2, bert-base, vit-l16 and llama-3-8b to this part "
        "(default: 1)",
    )
    group.add_argument(
        "--device",
        choices=machine.devices(),
        default="cpu",
        help="where the tensors are (default: cpu)",
    )
    add_number(group, "--rounds", 1, 15, f"how often {what} is timed")
    group.add_argument(
        "--seconds",
        type=at_least(0, float),
        default=2.5,
        metavar="S",
        help=f"{what} that would take longer than this over all rounds of a row sits some out, but "
        f"not below {timing.MIN_ROUNDS} (default: 2.5)",
    )
