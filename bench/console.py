"""One run of the command: what was measured so far, where it is shown, and how far it got."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence

from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from . import job_tables, rows
from .rows import Row
from .tables import Table
from .timing import Advance, use_threads

# Columns the widest table takes. A narrower terminal breaks its lines, which loses nothing; rich
# would cut off the figures instead.
WIDTH = 150


class Run:
    """Collects rows, each with where and with what it was measured, and prints."""

    def __init__(self, device: str = "cpu") -> None:
        self.console = Console(highlight=False)
        self.console.width = max(self.console.width, WIDTH)
        self.rows: list[Row] = []
        self.device = device
        if os.getloadavg()[0] > (os.cpu_count() or 1) / 2:
            self.say("The machine has just been busy: if it still is, times are too long and "
                     "ratios unsteady.")  # fmt: skip

    def say(self, text: str) -> None:
        """Prints a sentence."""
        self.console.print(text, soft_wrap=True, markup=False)

    def show(self, made: Iterable[Table]) -> None:
        """Prints tables."""
        for table in made:
            self.console.print(Text(table.title, style="bold"), table.to_rich(), sep="\n")

    def work(
        self, title: str, total: int, threads: int,
        measured: Callable[[Advance], Iterable[list[Row]]],
    ) -> list[Row]:  # fmt: skip
        """Rows as they are measured, on so many threads; shows their tables, however it ends.

        The progress bar draws itself only before each of `total` parts: a thread that redraws by
        the clock would wake up inside steps.
        """
        where, found = rows.where(self.device, threads), list[Row]()
        self.say(f"\n{title}\n{rows.source(where)}")
        bar = Progress(console=self.console, auto_refresh=False, transient=True)
        task = bar.add_task("", total=total, completed=-1)

        def advance(label: str) -> None:
            bar.update(task, description=label, advance=1, refresh=True)

        try:
            with use_threads(threads), bar:
                for made in measured(advance):
                    found += [{**row, **where} for row in made]
        finally:
            self.rows += found
            if found:
                self.show(job_tables.of(found))
                for sentence in job_tables.sentences(found):
                    self.say(sentence)
        return found

    def gate(self, slow: Sequence[str], bound: float | None) -> int:
        """Names the rows below a bound, where there is one; 1 if there are any."""
        for row in slow if bound is not None else ():
            self.say(f"Below {bound}: {row}")
        return int(bound is not None and bool(slow))
