"""Command line of the benchmark: ``python -m fusedopt.bench [JOB] [options]``.

Without a job, training and the bare step run; that is the project's main job, ``make bench``. Every
argument is checked before any work starts. Exit codes: 0, all is well; 1, fusedopt did not train as
torch.optim does, or is slower than ``--fail-below`` allows; 2, an argument is wrong; 130,
interrupted (what was measured is printed).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fusedopt.backends import backend_for

from . import check, loading, machine, pipeline, providers, showing, step, workloads
from .options import STANDARD, add_common, add_pipeline, add_step, add_train

Task = TypeVar("Task", step.Task, pipeline.Task)

NEEDS = {"rich": "rich", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}
EXIT_BOUND, EXIT_INTERRUPTED = 1, 130


@dataclass(frozen=True)
class Job:
    """A subcommand.

    Attributes:
        summary: what it does, for ``--help``.
        add: adds its options.
        needs: modules it needs beyond fusedopt's own.
        run: does it, given its checked options, and returns the exit code; None for the jobs that
            share a session: `main` runs these.
    """

    summary: str
    add: Callable[[argparse.ArgumentParser], None]
    needs: tuple[str, ...]
    run: Callable[[argparse.ArgumentParser, argparse.Namespace], int] | None = None


def _add_train(parser: argparse.ArgumentParser) -> None:
    add_common(parser, "all")
    add_train(parser.add_argument_group("training"))


def _add_step(parser: argparse.ArgumentParser) -> None:
    add_common(parser, "all")
    add_step(parser.add_argument_group("timing the step"))


def _add_pipeline(parser: argparse.ArgumentParser) -> None:
    add_common(parser, ["AdamW"])
    add_pipeline(parser.add_argument_group("timing the step and what is around it"))


JOBS: dict[str, Job] = {
    "train": Job(
        "Trains on handwritten digits through torch.optim and fusedopt and compares the two.",
        _add_train, ("rich", "sklearn", "matplotlib"),
    ),
    "step": Job(
        "Times the bare optimizer step against torch's, other libraries' and the traffic floor.",
        _add_step, ("rich",),
    ),
    "pipeline": Job(
        "Times what a training loop does around the step (unscale, clip, average, zero): torch's "
        "chain of passes against fusedopt's one call and its traffic floor.",
        _add_pipeline, ("rich", "matplotlib"),
    ),
    "load": Job(
        "Times what feeds a loop: DataLoader, torchdata, a plain loop, TensorLoader, a memcpy.",
        loading.add_options, ("rich",), loading.run,
    ),
    "parity": Job(
        "Compares steps with torch.optim's in float64: errors in ulps of the update.",
        check.add_options, ("rich",), check.run,
    ),
    "report": Job(
        "Turns result files into a page, pictures and tables; compares two.",
        showing.add_options, ("rich", "matplotlib"), showing.run,
    ),
    "list": Job(
        "Lists workloads and providers, and why a provider cannot run here.",
        check.add_list_options, ("rich",), check.run_list,
    ),
}  # fmt: skip


def make_parser(command: str | None) -> argparse.ArgumentParser:
    """Parser of one job's options, or of train's and step's when `command` is None."""
    listed = "; ".join(f"{name}: {job.summary}" for name, job in JOBS.items())
    parser = argparse.ArgumentParser(
        prog="python -m fusedopt.bench" + (f" {command}" if command else ""),
        description=JOBS[command].summary
        if command
        else f"Without a job, train and step run. Jobs, each with its own --help: {listed}",
    )
    if command:
        JOBS[command].add(parser)
    else:
        _add_train(parser)
        add_step(parser.add_argument_group("timing the step"))
    return parser


def check_needs(parser: argparse.ArgumentParser, command: str | None) -> None:
    """Stops if a package of the jobs is missing; they are no dependencies of fusedopt itself."""
    modules = JOBS[command].needs if command else tuple(NEEDS)
    missing = [NEEDS[name] for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(
            f"missing: {', '.join(missing)}; run: python -m pip install {' '.join(missing)}"
        )


def named_workloads(options: argparse.Namespace, standard: Sequence[str]) -> list[str]:
    """The workloads asked for, those of this command line alone added to the table."""
    asked = options.workloads or ([] if options.model else standard)
    own = [] if options.model is None else [options.model]
    for name in [member for family in asked for member in workloads.members(family)]:
        own.append(workloads.WORKLOADS[name].scaled(options.scale))
    workloads.WORKLOADS.update({workload.name: workload for workload in own})
    return [workload.name for workload in own]


def check_providers(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Stops if a provider that was asked for by name has no step for any of the optimizers."""
    if set(options.providers) == set(providers.PROVIDERS):
        return  # all: those that there are
    for name in options.providers:
        reasons = {
            providers.PROVIDERS[name].unavailable(optimizer, step.DTYPES[dtype], options.device)
            for optimizer in options.optimizers
            for dtype in options.dtype or ["float32"]
        }
        if "" not in reasons:
            parser.error(f"argument --providers: {name}: {sorted(reasons)[0]}")


def plan_step(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> tuple[list[step.Task], list[str]]:
    """The rows of the step job that fit into memory, and a note on each workload that does not."""
    if options.providers is None:
        options.providers = providers.usual(options.device)
    else:
        check_providers(parser, options)
    if options.baseline not in (step.BEST, *options.providers):
        parser.error(f"argument --baseline: {options.baseline} is not among the providers")
    names = named_workloads(options, STANDARD)
    tasks = step.plan_tasks(names, options.optimizers, options.dtype, options.device)
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
    names = named_workloads(options, pipeline.STANDARD)
    tasks = pipeline.plan_tasks(names, options.chains, options.optimizers, options.device)
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
    # A sweep goes as far as memory does.
    refused = [name for name in short if not workloads.WORKLOADS[name].family]
    notes = [
        f"workload {name} needs {bytes / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are "
        f"available; ask for {remedy}"
        for name, bytes in short.items()
    ]
    if refused and (options.workloads or options.model):
        parser.error(f"argument --workloads: {notes[list(short).index(refused[0])]}")
    return [task for task in needed if task.workload not in short], notes


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments and arguments[0] in JOBS else None
    parser = make_parser(command)
    if command is None and arguments and not arguments[0].startswith("-"):
        parser.error(
            f"unknown subcommand {arguments[0]!r}; wanted: {', '.join(JOBS)}, or none for the "
            "first two"
        )
    options = parser.parse_args(arguments[1:] if command else arguments)
    check_needs(parser, command)
    if command and (run := JOBS[command].run):
        return run(parser, options)
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
    return EXIT_BOUND if session.failed or session.slow_rows() else 0


if __name__ == "__main__":
    sys.exit(main())
