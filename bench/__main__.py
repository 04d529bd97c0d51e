"""Command line of the benchmark: ``python -m fusedopt.bench [train | step] [options]``.

Without a subcommand both jobs run; that is the project's main job, ``make bench``. Every argument
is checked before any work starts. Exit codes: 0, all is well; 1, fusedopt did not train as
torch.optim does; 2, an argument is wrong; 130, interrupted (what was measured is printed).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from . import machine, optimizers, step, timing, train, workloads
from .providers import PROVIDERS

COMMANDS = ("train", "step")
DEFAULT_OUT = "build/bench"
# What has options: a parser or a group of one.
Options = argparse.ArgumentParser | argparse._ArgumentGroup

NEEDS = {"rich": "rich", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}
DESCRIPTIONS = {
    None: "Subcommands: train (loss curves beside torch.optim's), step (time of the bare step); "
    "each has its own --help. Without one, both jobs run.",
    "train": "Trains on handwritten digits through torch.optim and fusedopt and compares the two.",
    "step": "Times the bare optimizer step against torch's own and against the traffic floor.",
}
EXIT_BOUND, EXIT_INTERRUPTED = 1, 130


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


def make_parser(command: str | None) -> argparse.ArgumentParser:
    """Parser of one subcommand's options, or of both when `command` is None."""
    parser = argparse.ArgumentParser(
        prog="python -m fusedopt.bench" + (f" {command}" if command else ""),
        description=DESCRIPTIONS[command],
    )
    add_common(parser)
    if command in (None, "train"):
        add_train(parser.add_argument_group("training"))
    if command in (None, "step"):
        add_step(parser.add_argument_group("timing the step"))
    return parser


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


def add_common(parser: argparse.ArgumentParser) -> None:
    """Adds the options of every job."""
    add_names(parser, "--optimizers", "optimizer", optimizers.names())
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
    group.add_argument(
        "--out",
        type=directory,
        default=DEFAULT_OUT,
        metavar="DIR",
        help=f"where loss_curves.png goes (default: {DEFAULT_OUT})",
    )


def add_step(group: Options) -> None:
    """Adds the options of the step job."""
    # None, not the names: what is asked for by name and does not fit into memory is an error.
    standard = [name for name, workload in workloads.WORKLOADS.items() if workload.standard]
    default = f"of {', '.join(standard)} those that fit into memory"
    add_names(group, "--workloads", "workload", workloads.WORKLOADS, default)
    group.add_argument(
        "--device",
        choices=machine.devices(),
        default="cpu",
        help="where the tensors are (default: cpu)",
    )
    usual = [name for name, provider in PROVIDERS.items() if provider.default]
    add_names(group, "--providers", "provider", PROVIDERS, usual)
    default = "float32, and on huge and many also AdamW in bfloat16"
    add_names(group, "--dtype", "dtype", step.DTYPES, default)
    add_number(group, "--rounds", 1, 15, "how often each step is timed")
    group.add_argument(
        "--seconds",
        type=at_least(0, float),
        default=2.5,
        metavar="S",
        help="a step that would take longer than this over all rounds of a row sits some out, but "
        f"not below {timing.MIN_ROUNDS} (default: 2.5)",
    )


def check_needs(parser: argparse.ArgumentParser, command: str | None) -> None:
    """Stops if a package of the jobs is missing; they are no dependencies of fusedopt itself."""
    modules = ["rich"] if command == "step" else list(NEEDS)
    missing = [NEEDS[name] for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(
            f"missing: {', '.join(missing)}; run: python -m pip install {' '.join(missing)}"
        )


def check_memory(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> tuple[list[step.Task], list[str]]:
    """The rows of the step job that fit into memory, and a note on each workload that does not.

    A workload asked for by name that does not fit is an error instead.
    """
    tasks = step.plan_tasks(
        options.workloads
        or [name for name, workload in workloads.WORKLOADS.items() if workload.standard],
        options.optimizers,
        options.dtype,
        options.device,
    )
    available = machine.available_memory(options.device)
    if available is None:
        return tasks, []
    needed = {task: task.memory(options.providers) for task in tasks}
    short = {task.workload: bytes for task, bytes in needed.items() if bytes > 0.9 * available}
    notes = [
        f"workload {name} needs {bytes / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are "
        "available; ask for fewer providers or optimizers"
        for name, bytes in short.items()
    ]
    if notes and options.workloads:
        parser.error(f"argument --workloads: {notes[0]}")
    return [task for task in tasks if task.workload not in short], notes


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments and arguments[0] in COMMANDS else None
    parser = make_parser(command)
    if command is None and arguments and not arguments[0].startswith("-"):
        parser.error(
            f"unknown subcommand {arguments[0]!r}; wanted: {', '.join(COMMANDS)}, or none for both"
        )
    options = parser.parse_args(arguments[1:] if command else arguments)
    check_needs(parser, command)
    tasks, skipped = ([], []) if command == "train" else check_memory(parser, options)

    from .session import Session  # needs rich, which check_needs has just found

    session = Session(options, arguments)
    try:
        if command != "step":
            session.train()
        if command != "train":
            for note in skipped:
                session.say(f"Left out: {note}")
            session.step(tasks)
    except KeyboardInterrupt:
        session.say("Interrupted.")
        session.finish(complete=False)
        return EXIT_INTERRUPTED
    session.finish(complete=True)
    return EXIT_BOUND if session.failed else 0


if __name__ == "__main__":
    sys.exit(main())
