"""One run of the command: does the jobs, shows progress, prints what was measured."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import machine, memory, pipeline, report, results, step, tables, train, workloads

# The networks are below the size from which torch splits most of its loops, and a second thread
# that has to be waited for makes training on a busy machine many times slower.
TRAIN_THREADS = 1


def counted(number: int, noun: str) -> str:
    """A number with its noun: ``1 epoch``, ``30 epochs``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


@contextlib.contextmanager
def use_threads(number: int) -> Iterator[None]:
    """Sets torch's number of threads (which fusedopt obeys) for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def progress_bar(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar over `total` pieces of work; gives what to call before each, with a label.

    It draws itself only when called: a thread that redraws by the clock would wake up inside steps.
    """
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        bar = progress.add_task("", total=total)
        begun = 0

        def advance(label: str) -> None:
            nonlocal begun
            progress.update(bar, description=label, completed=begun, refresh=True)
            begun += 1

        yield advance


class Session:
    """Options of a run, what it measured so far, and where it prints.

    Args:
        options: of the command line, checked.
        arguments: the command line itself, for the result file.
    """

    def __init__(self, options: argparse.Namespace, arguments: Sequence[str]) -> None:
        self.options = options
        self.arguments = arguments
        self.console = report.make_console()
        self.machine = machine.describe()
        self.train_rows: list[train.Row] = []
        self.step_rows: list[step.Row] = []
        self.pipeline_rows: list[pipeline.Row] = []
        report.print_machine(self.console, self.machine)

    @property
    def failed(self) -> bool:
        """Whether fusedopt trained differently from torch.optim somewhere."""
        return any(row.failures() for row in self.train_rows)

    def train(self) -> None:
        """Trains on the digits; prints the table and saves the picture, as far as it got."""
        options = self.options
        names = [name for name in options.optimizers if hasattr(torch.optim, name)]
        threads = options.threads or TRAIN_THREADS
        total = len(options.models) * len(names) * options.epochs
        self.say(
            f"\nTraining {counted(len(options.models), 'network')} with "
            f"{counted(len(names), 'optimizer')}, {counted(options.epochs, 'epoch')} each, in "
            f"lockstep through torch.optim and fusedopt, {counted(threads, 'thread')}"
        )
        try:
            with (
                use_threads(options.threads or TRAIN_THREADS),
                progress_bar(self.console, total) as advance,
            ):
                for row in train.measure(
                    options.models, names, options.epochs, options.seed, advance
                ):
                    self.train_rows.append(row)
        finally:
            if self.train_rows:
                self.show_train()

    def show_train(self) -> None:
        """Prints the table of the digits job and draws its picture."""
        from . import picture  # matplotlib is slow to import: not before it has work

        path = self.options.out / "loss_curves.png"
        picture.save_loss_curves(self.train_rows, path)
        self.console.print(report.train_table(self.train_rows))
        self.say(report.train_legend(self.train_rows))
        self.say(report.train_verdict(self.train_rows))
        self.say(f"Loss curves: {path}")

    def step(self, tasks: list[step.Task]) -> None:
        """Checks arithmetic, measures memory, times the steps; shows each workload once done."""
        options = self.options
        threads = options.threads or torch.get_num_threads()
        weighed = self.weighed(tasks)
        runs = [name for name in options.providers if name != step.FLOOR]
        before = len(options.providers) * (not options.skip_parity) + len(runs) * bool(weighed)
        total = before + len(tasks) * options.rounds
        self.say(
            f"\nTiming the bare step, {counted(options.rounds, 'round')}, round-robin in one "
            f"process, {counted(threads, 'thread')}; before that, arithmetic and memory"
        )
        shown: list[step.Row] = []
        try:
            with (
                use_threads(threads),
                progress_bar(self.console, total) as advance,
            ):
                parities = {}
                if not options.skip_parity:
                    parities = step.check_arithmetic(tasks, options.providers, advance)
                peaks = memory.measure(weighed, runs, advance) if weighed else {}
                for row in step.measure(
                    tasks, options.providers, options.rounds, options.seconds, advance,
                    options.baseline, peaks, parities,
                ):  # fmt: skip
                    if shown and shown[0].workload.group != row.workload.group:
                        self.console.print(tables.step_tables(shown))
                        shown.clear()
                    shown.append(row)
                    self.step_rows.append(row)
        finally:
            if shown:
                self.console.print(tables.step_tables(shown))
                for note in tables.step_notes(self.step_rows):
                    self.say(note)
                self.say(tables.step_legend(options.baseline))
                self.say(tables.step_summary(self.step_rows))

    def weighed(self, tasks: list[step.Task]) -> list[step.Task]:
        """The tasks whose memory is measured: a fresh process takes seconds, a sweep has many."""
        if self.options.memory == "none":
            return []
        names = [task.optimizer for task in tasks]
        one = "AdamW" if "AdamW" in names else names[0]
        return [
            task
            for task in tasks
            if not workloads.WORKLOADS[task.workload].family
            and (self.options.memory == "all" or task.optimizer == one)
        ]

    def slow_rows(self) -> list[str]:
        """Rows of the step job that are below --fail-below, in words."""
        bound = getattr(self.options, "fail_below", None)
        return [] if bound is None else results.slower_than(self.figures, bound)

    @property
    def figures(self) -> list[results.Figure]:
        """The step job, a flat record a provider and row."""
        threads = self.options.threads or torch.get_num_threads()
        rows = [{**row.to_json(), "threads": threads} for row in self.step_rows]
        return [figure for row in rows for figure in results.figures_of(row, self.machine)]

    def pipeline(self, tasks: list[pipeline.Task]) -> None:
        """Times chains and calls; prints a workload's table once it is complete, then draws."""
        options = self.options
        threads = options.threads or torch.get_num_threads()
        total = len(tasks) * options.rounds
        self.say(
            f"\nTiming the step and what is around it, {counted(options.rounds, 'round')}, "
            f"round-robin in one process, {counted(threads, 'thread')}"
        )
        shown: list[pipeline.Row] = []
        try:
            with (
                use_threads(threads),
                progress_bar(self.console, total) as advance,
            ):
                for row in pipeline.measure(tasks, options.rounds, options.seconds, advance):
                    if shown and shown[0].task.workload != row.task.workload:
                        self.console.print(report.pipeline_table(shown))
                        shown.clear()
                    shown.append(row)
                    self.pipeline_rows.append(row)
        finally:
            if shown:
                self.console.print(report.pipeline_table(shown))
                for note in report.pipeline_notes(self.pipeline_rows):
                    self.say(note)
                self.say(report.pipeline_legend(self.pipeline_rows))
                for line in report.pipeline_summary(self.pipeline_rows):
                    self.say(line)
                self.draw_pipeline()

    def draw_pipeline(self) -> None:
        """Draws the pictures of the pipeline job."""
        from . import picture  # matplotlib is slow to import: not before it has work

        path = self.options.out / "pipeline.png"
        picture.save_pipeline(self.pipeline_rows, path)
        widest = max(self.pipeline_rows, key=lambda row: sum(row.torch_bytes.values()))
        passes = self.options.out / "pipeline_bytes.png"
        picture.save_passes(widest, passes)
        self.say(f"Bars: {path}; passes and their bytes: {passes}")

    @property
    def train_result(self) -> dict[str, Any]:
        """The digits job, as it stands in the result file."""
        rows = [row.to_json() for row in self.train_rows]
        if not rows:
            return {"rows": rows}
        options = self.options
        threads = options.threads or TRAIN_THREADS
        return {"threads": threads, "epochs": options.epochs, "seed": options.seed, "rows": rows}

    @property
    def step_result(self) -> dict[str, Any]:
        """The step job, as it stands in the result file."""
        return self._race_result([row.to_json() for row in self.step_rows])

    @property
    def pipeline_result(self) -> dict[str, Any]:
        """The pipeline job, as it stands in the result file."""
        return self._race_result([row.to_json() for row in self.pipeline_rows])

    def _race_result(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        if not rows:
            return {"rows": rows}
        options = self.options
        threads = options.threads or torch.get_num_threads()
        return {"threads": threads, "rounds": options.rounds, "rows": rows}

    def finish(self, complete: bool) -> None:
        """Writes the result files that were asked for, and names the rows that are too slow."""
        if path := getattr(self.options, "csv", None):
            results.write_csv(path, self.figures)
            self.say(f"The table: {path}")
        for row in self.slow_rows():
            self.say(f"Below {self.options.fail_below}: {row}")
        if self.options.json:
            content = {
                "schema": report.SCHEMA,
                "command": self.arguments,
                "complete": complete,
                "machine": self.machine,
                "train": self.train_result,
                "step": self.step_result,
                "pipeline": self.pipeline_result,
            }
            report.write_json(self.options.json, content)
            self.say(f"Everything measured: {self.options.json}")

    def say(self, text: str) -> None:
        """Prints a sentence."""
        self.console.print(text, soft_wrap=True, markup=False)
