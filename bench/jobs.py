"""The jobs, each of which takes its checked options and the `Run` that it reports to.

They return the exit code: 1 where fusedopt did not do what was asked of it. What needs matplotlib
is imported when a job begins, after the command line has looked for it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from fusedopt.backends import backend_for

from . import (
    job_tables,
    load,
    memory,
    optimizers,
    parity,
    pipeline,
    providers,
    rows,
    step,
    timing,
    train,
    transfer,
    workloads,
)
from .providers import PROVIDERS
from .rows import BEST, CANDIDATE, FLOOR, Row
from .timing import Task

Parser, Options = argparse.ArgumentParser, argparse.Namespace

STANDARD = [name for name, workload in workloads.WORKLOADS.items() if workload.standard]
# The networks are below the size from which torch splits most of its loops, and a second thread
# that has to be waited for makes training on a busy machine many times slower.
TRAIN_THREADS = 1


# ---- what can run here ----


def named_workloads(options: Options, standard: Sequence[str]) -> list[str]:
    """The workloads asked for, those of this command line alone added to the table."""
    asked = options.workloads or ([] if options.model else standard)
    own = [] if options.model is None else [options.model]
    for name in [member for family in asked for member in workloads.members(family)]:
        own.append(workloads.WORKLOADS[name].scaled(options.scale))
    workloads.WORKLOADS.update({workload.name: workload for workload in own})
    return [workload.name for workload in own]


def named_providers(parser: Parser, options: Options) -> list[str]:
    """The providers asked for; one without a step for any of the optimizers is an error."""
    if not options.providers:
        return providers.usual(options.device)
    if "all" in options.providers:
        return [*PROVIDERS]
    for name in options.providers:
        reasons = {
            PROVIDERS[name].unavailable(optimizer, step.DTYPES[dtype], options.device)
            for optimizer in options.optimizers
            for dtype in options.dtype or ["float32"]
        }
        if "" not in reasons and name != FLOOR:  # whose absence is told, and is no error
            parser.error(f"argument --providers: {name}: {sorted(reasons)[0]}")
    return list(options.providers)


def fitting(parser: Parser, options: Options, tasks: Sequence[Task], run: Any) -> list[Task]:
    """Those of the tasks whose workloads fit into memory; says which do not.

    A workload asked for by name that does not fit is an error instead; a sweep goes as far as
    memory does.
    """
    available = rows.available_memory(options.device)
    short = {task.columns["workload"]: task.memory for task in tasks
             if available is not None and task.memory > 0.9 * available}  # fmt: skip
    for name, size in short.items():
        note = (
            f"workload {name} needs {size / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are "
            "available; ask for fewer providers or smaller workloads"
        )
        known = workloads.WORKLOADS.get(name)
        if (options.workloads or options.model) and not (known and known.family):
            parser.error(f"argument --workloads: {note}")
        run.say(f"Left out: {note}")
    return [task for task in tasks if task.columns["workload"] not in short]


def raced(tasks: Sequence[Task], options: Options, advance: timing.Advance) -> Iterator[list[Row]]:
    """The rows of tasks, each measured as the options say."""
    for task in tasks:
        yield timing.measure(task, options.rounds, options.seconds, advance)


# ---- the jobs ----


def run_all(parser: Parser, options: Options, run: Any) -> int:
    """Trains, then times the step; of the large model, that of one optimizer, to be done soon."""
    tasks = planned_steps(parser, options, run)
    if not options.workloads:
        one = optimizers.most_used(options.optimizers)
        tasks = [
            t for t in tasks if t.columns["workload"] != "gpt2" or one == t.columns["optimizer"]
        ]
    return run_train(parser, options, run) | timed_steps(tasks, options, run)


def run_train(parser: Parser, options: Options, run: Any) -> int:
    """Trains on the digits; prints the table and saves the picture, as far as it got."""
    from . import plots

    names = [name for name in options.optimizers if hasattr(torch.optim, name)]
    threads = options.threads or TRAIN_THREADS
    found = run.work(
        f"Training {', '.join(options.models)}, {options.epochs} epochs, in lockstep through "
        f"torch.optim and fusedopt, on {threads} thread{'s' * (threads > 1)}",
        len(options.models) * len(names) * options.epochs, threads,
        lambda advance: train.measure(
            options.models, names, options.epochs, options.seed, advance
        ),
    )  # fmt: skip
    if not found:
        return 0
    run.say(train.verdict(found))
    run.say(f"Loss curves: {plots.loss_curves(found, options.out / 'loss_curves.png')}")
    return int(any(train.failures(row) for row in found if row["provider"] == CANDIDATE))


def planned_steps(parser: Parser, options: Options, run: Any) -> list[Task]:
    """The tasks of the step job that fit into memory."""
    options.providers = named_providers(parser, options)
    if options.baseline not in (BEST, *options.providers):
        parser.error(f"argument --baseline: {options.baseline} is not among the providers")
    names = named_workloads(options, STANDARD)
    tasks = step.plan(names, options.optimizers, options.dtype, options.device, options.providers,
                      options.baseline)  # fmt: skip
    return fitting(parser, options, tasks, run)


def run_step(parser: Parser, options: Options, run: Any) -> int:
    """Checks arithmetic, measures memory, times the steps."""
    return timed_steps(planned_steps(parser, options, run), options, run)


def timed_steps(tasks: Sequence[Task], options: Options, run: Any) -> int:
    """The same of tasks."""
    runs = [name for name in options.providers if name != FLOOR]
    one = optimizers.most_used([task.columns["optimizer"] for task in tasks]) if tasks else ""
    weighed = []
    for kind in [task.columns for task in tasks]:
        work = workloads.WORKLOADS[kind["workload"]]
        # A fresh process takes seconds, and a sweep has many tasks.
        wanted = options.memory == "all" or (options.memory == "one" and kind["optimizer"] == one)
        if wanted and not work.family:
            weighed.append({**kind, "shapes": work.shapes, "grouped": work.grouped})

    def measured(advance: timing.Advance) -> Iterator[list[Row]]:
        known = {}
        if not options.skip_parity:
            known = step.check_arithmetic(tasks, options.providers, advance)
        peaks = memory.measure(weighed, runs, advance) if weighed else {}
        for found in raced(tasks, options, advance):
            for row in [row for row in found if "ms" in row]:
                name, kind = row["provider"], (row["optimizer"], row["dtype"])
                row |= known.get((name, *kind), {}) | peaks.get((name, row["workload"], *kind), {})
            yield found

    found = run.work(
        f"Timing the bare step, {options.rounds} rounds, round-robin in one process; before that, "
        "arithmetic and memory",
        len(runs) * ((not options.skip_parity) + bool(weighed)) + len(tasks) * options.rounds,
        options.threads or torch.get_num_threads(), measured,
    )  # fmt: skip
    return run.gate(rows.slower_than(found, options.fail_below or 0), options.fail_below)


def run_pipeline(parser: Parser, options: Options, run: Any) -> int:
    """Times chains and calls, then draws."""
    from . import plots

    if backend_for(options.device) is None:
        parser.error(f"argument --device: fusedopt has no kernels for {options.device} here; "
                     "python -m fusedopt says why")  # fmt: skip
    names = named_workloads(options, pipeline.STANDARD)
    tasks = pipeline.plan(names, options.chains, options.optimizers, options.device)
    tasks = fitting(parser, options, tasks, run)
    total, threads = len(tasks) * options.rounds, options.threads or torch.get_num_threads()
    title = "Timing the step and what is around it"
    found = run.work(title, total, threads, partial(raced, tasks, options))
    if found:
        bars = plots.pipeline_bars(found, options.out / "pipeline.png")
        passes = plots.pipeline_passes(found, options.out / "pipeline_bytes.png")
        run.say(f"Bars: {bars}; passes and their bytes: {passes}")
    return 0


def run_load(parser: Parser, options: Options, run: Any) -> int:
    """Races the feeds, prints the tables."""
    tasks = [task for name in options.workloads
             for task in load.plan(name, options.providers, options.device)]  # fmt: skip
    tasks = fitting(parser, options, tasks, run)
    sizes = transfer.SIZES if options.device == "cuda" else ()

    def measured(advance: timing.Advance) -> Iterator[list[Row]]:
        for task in tasks:
            yield load.race(task, options.rounds, options.seconds, advance)
        for mib in sizes:
            advance(f"{mib} MiB")
            yield [transfer.measure(mib)]

    title = f"Going through batches, {options.rounds} epochs, round-robin in one process"
    total = len(tasks) * options.rounds + len(sizes)
    run.work(title, total, torch.get_num_threads(), measured)
    return 0


def run_parity(parser: Parser, options: Options, run: Any) -> int:
    """Compares with torch in float64, and tells by the exit code whether named classes agree.

    A provider that differs is shown and no failure: what it computes is its library's business.
    """
    chosen: list[tuple[str, str, Any]] = []
    for path, cls in options.classes:
        name = options.reference or cls.__name__
        if name not in optimizers.names() or not hasattr(torch.optim, name):
            parser.error(f"argument --as: torch.optim has no {name}, of which {path} could be a "
                         f"copy; wanted: one of {', '.join(optimizers.names())}")  # fmt: skip
        chosen.append((path, name, partial(providers.make, cls, name)))
    if chosen and not options.providers:
        chosen.insert(0, ("torch default", chosen[0][1], getattr(torch.optim, chosen[0][1])))
    else:
        chosen += [
            (PROVIDERS[who].title, name, partial(PROVIDERS[who].optimizer, name))
            for who in named_providers(parser, options)
            for name in options.optimizers
            if who != FLOOR and not PROVIDERS[who].unavailable(name, device=options.device)
        ]

    def measured(advance: timing.Advance) -> Iterator[list[Row]]:
        for who, name, make in chosen:
            advance(f"{who} / {name}")
            yield [
                {"job": "parity", "provider": who, "optimizer": name, "dtype": dtype,
                 **parity.check(make, name, step.DTYPES[dtype], options.device)}
                for dtype in options.dtype
            ]  # fmt: skip

    found = run.work("Comparing with torch.optim in float64", len(chosen),
                     torch.get_num_threads(), measured)  # fmt: skip
    for row in [row for row in found if row["error"]]:
        run.say(f"{row['provider']}, {row['optimizer']}: {row['error']}")
    named = {path for path, _ in options.classes}
    return int(any(row["provider"] in named and row["parity"] != "same" for row in found))


def run_report(parser: Parser, options: Options, run: Any) -> int:
    """Writes what was asked for; 1 if something is below --fail-below."""
    from . import report

    if not options.files and not options.update_docs:
        parser.error("the following arguments are required: FILE")

    def steps(path: Any) -> list[Row]:
        if found := rows.steps(rows.read(path)):
            return found
        raise rows.ResultError(f"{path} has no rows of the step job; wanted: a file of step --json")

    try:
        found = [row for path in options.files for row in steps(path)]
        changes = rows.compare(found, steps(options.against)) if options.against else []
        if options.against and not changes:
            parser.error(f"--against: {options.against} has no row in common with the others")
        for path in report.update(options.files) if options.update_docs else ():
            run.say(f"Written: {path}")
    except rows.ResultError as error:
        parser.error(str(error))
    if found:
        page = report.write_page(found, changes, options.out)
        run.say(f"The page: {page}; its pictures beside it")
    slow = rows.slower_than(changes or found, options.fail_below or 0)
    return int(run.gate(slow, options.fail_below))


def run_list(parser: Parser, options: Options, run: Any) -> int:
    """Prints workloads, and providers with what they can step here or why they cannot."""
    run.show([job_tables.workload_table(workloads.WORKLOADS.values()),
              job_tables.provider_table(options.device)])  # fmt: skip
    return 0
