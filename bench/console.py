"""One run of the command: what was measured so far, where it is shown, and how far it got."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import rows
from .rows import Row
from .tables import WIDTH, Table
from .timing import use_threads


class Run:
    """Collects rows, each with where and with what it was measured, and prints."""

    def __init__(self, device: str = "cpu", threads: int | None = None) -> None:
        self.console = Console(highlight=False)
        self.console.width = max(self.console.width, WIDTH)
        self.rows: list[Row] = []
        self.device = device
        self.where = rows.where(device, threads or 0)
        if rows.is_busy():
            self.say("The machine has just been busy: if it still is, times are too long and "
                     "ratios unsteady.")  # fmt: skip

    def add(self, found: Sequence[Row]) -> list[Row]:
        """Keeps rows, and gives them with what they all have in common."""
        made = [{**row, **self.where} for row in found]
        self.rows += made
        return made

    def say(self, text: str) -> None:
        """Prints a sentence."""
        self.console.print(text, soft_wrap=True, markup=False)

    def show(self, table: Table) -> None:
        """Prints a table."""
        self.console.print(table.to_rich())

    def gate(self, slow: Sequence[str], bound: float | None) -> int:
        """Names the rows below a bound; 1 if there are any."""
        for row in slow if bound is not None else ():
            self.say(f"Below {bound}: {row}")
        return int(bound is not None and bool(slow))

    @contextmanager
    def working(self, total: int, threads: int) -> Iterator[Callable[[str], None]]:
        """A progress bar over so much work, on so many threads; gives what to call before each.

        It draws itself only when called: a thread that redraws by the clock would wake up inside
        steps.
        """
        self.where = rows.where(self.device, threads)
        self.say(rows.source({**self.where}))
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                   TimeElapsedColumn())  # fmt: skip
        bar = Progress(*columns, console=self.console, auto_refresh=False, transient=True)
        with use_threads(threads), bar as progress:
            task, begun = progress.add_task("", total=total), 0

            def advance(label: str) -> None:
                nonlocal begun
                progress.update(task, description=label, completed=begun, refresh=True)
                begun += 1

            yield advance
