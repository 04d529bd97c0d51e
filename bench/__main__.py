"""Command line of the benchmark: ``python -m fusedopt.bench [train | step | pipeline] [options]``.

Without a subcommand the first two jobs run; that is the project's main job, ``make bench``. Every
argument is checked before any work starts. Exit codes: 0, all is well; 1, fusedopt did not train as
torch.optim does; 2, an argument is wrong; 130, interrupted (what was measured is printed).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from fusedopt.backends import backend_for

from . import machine, optimizers, pipeline, step, timing, train, workloads
from .providers import PROVIDERS

COMMANDS = ("train", "step", "pipeline")
DEFAULT_OUT = "build/bench"
STANDARD = [name for name, workload in workloads.WORKLOADS.items() if workload.standard]
# What has options: a parser or a group of one.
Options = argparse.ArgumentParser | argparse._ArgumentGroup
Task = TypeVar("Task", step.Task, pipeline.Task)

NEEDS = {"rich": "rich", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}
DESCRIPTIONS = {
    None: "Subcommands: train (loss curves beside torch.optim's), step (time of the bare step), "
    "pipeline (time of the step with unscaling, clipping, averaging and clearing); each has its "
    "own --help. Without one, train and step run.",
    "train": "Trains on handwritten digits through torch.optim and fusedopt and compares the two.",
    "step": "Times the bare optimizer step against torch's own and against the traffic floor.",
    "pipeline": "Times what a training loop does around the step (unscale, clip, average, zero): "
    "torch's chain of passes against fusedopt's one call and its traffic floor.",
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
    """Parser of one subcommand's options, or of train's and step's when `command` is None."""
    parser = argparse.ArgumentParser(
        prog="python -m fusedopt.bench" + (f" {command}" if command else ""),
        description=DESCRIPTIONS[command],
    )
    add_common(parser, ["AdamW"] if command == "pipeline" else "all")
    if command in (None, "train"):
        add_train(parser.add_argument_group("training"))
    if command in (None, "step"):
        add_step(parser.add_argument_group("timing the step"))
    if command == "pipeline":
        add_pipeline(parser.add_argument_group("timing the step and what is around it"))
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
    usual = [name for name, provider in PROVIDERS.items() if provider.default]
    add_names(group, "--providers", "provider", PROVIDERS, usual)
    default = "float32, and on huge and many also AdamW in bfloat16"
    add_names(group, "--dtype", "dtype", step.DTYPES, default)


def add_pipeline(group: Options) -> None:
    """Adds the options of the pipeline job."""
    add_race(group, pipeline.STANDARD, "a chain or call")
    add_names(group, "--chains", "chain", pipeline.CHAINS)
    add_out(group, "pipeline.png")


def add_race(group: Options, standard: Sequence[str], what: str) -> None:
    """Adds the options of a job that times `what`, on the workloads `standard` by default."""
    # None, not the names: what is asked for by name and does not fit into memory is an error.
    default = f"of {', '.join(standard)} those that fit into memory"
    add_names(group, "--workloads", "workload", workloads.WORKLOADS, default)
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


def check_needs(parser: argparse.ArgumentParser, command: str | None) -> None:
    """Stops if a package of the jobs is missing; they are no dependencies of fusedopt itself."""
    needs = {"step": ["rich"], "pipeline": ["rich", "matplotlib"]}
    modules = needs.get(command or "", list(NEEDS))
    missing = [NEEDS[name] for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(
            f"missing: {', '.join(missing)}; run: python -m pip install {' '.join(missing)}"
        )


def plan_step(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> tuple[list[step.Task], list[str]]:
    """The rows of the step job that fit into memory, and a note on each workload that does not."""
    tasks = step.plan_tasks(
        options.workloads or STANDARD, options.optimizers, options.dtype, options.device
    )
    needed = {task: task.memory(options.providers) for task in tasks}
    return check_memory(parser, options, needed, "fewer providers or optimizers")


def plan_pipeline(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> tuple[list[pipeline.Task], list[str]]:
    """The rows of the pipeline job that fit into memory, and a note on each that do not."""
    if backend_for(options.device) is None:
        parser.error(
            f"argument --device: fusedopt has no kernels for {options.device} here; "
            "python -m fusedopt says why"
        )
    tasks = pipeline.plan_tasks(
        options.workloads or pipeline.STANDARD, options.chains, options.optimizers, options.device
    )
    needed = {task: task.memory() for task in tasks}
    return check_memory(parser, options, needed, "smaller workloads")


def check_memory(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    needed: Mapping[Task, int],
    remedy: str,
) -> tuple[list[Task], list[str]]:
    """Those of the tasks whose workloads fit into memory, and a note on each that does not.

    A workload asked for by name that does not fit is an error instead.
    """
    available = machine.available_memory(options.device)
    if available is None:
        return list(needed), []
    short = {task.workload: bytes for task, bytes in needed.items() if bytes > 0.9 * available}
    notes = [
        f"workload {name} needs {bytes / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are "
        f"available; ask for {remedy}"
        for name, bytes in short.items()
    ]
    if notes and options.workloads:
        parser.error(f"argument --workloads: {notes[0]}")
    return [task for task in needed if task.workload not in short], notes


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments and arguments[0] in COMMANDS else None
    parser = make_parser(command)
    if command is None and arguments and not arguments[0].startswith("-"):
        parser.error(
            f"unknown subcommand {arguments[0]!r}; wanted: {', '.join(COMMANDS)}, or none for the "
            "first two"
        )
    options = parser.parse_args(arguments[1:] if command else arguments)
    check_needs(parser, command)
    steps: list[step.Task] = []
    chains: list[pipeline.Task] = []
    skipped: list[str] = []
    if command in (None, "step"):
        steps, skipped = plan_step(parser, options)
    if command == "pipeline":
        chains, skipped = plan_pipeline(parser, options)

    from .session import Session  # needs rich, which check_needs has just found

    session = Session(options, arguments)
    try:
        if command in (None, "train"):
            session.train()
        for note in skipped:
            session.say(f"Left out: {note}")
        if command in (None, "step"):
            session.step(steps)
        if command == "pipeline":
            session.pipeline(chains)
    except KeyboardInterrupt:
        session.say("Interrupted.")
        session.finish(complete=False)
        return EXIT_INTERRUPTED
    session.finish(complete=True)
    return EXIT_BOUND if session.failed else 0


if __name__ == "__main__":
    sys.exit(main())
