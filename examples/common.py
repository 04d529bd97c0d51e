"""Shared by the examples: command line, progress bar, pictures, TensorBoard logs, and claims.

An example states in sentences what its pictures show and checks each of them, because a picture
looks convincing whatever happened. A claim that does not hold makes the exit status 1.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import matplotlib

matplotlib.use("Agg")  # write files, also where there is a display

import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatter
from PIL import Image
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

T = TypeVar("T")

# The colour-blind safe palette of Okabe and Ito, without yellow, which is invisible on white.
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK, GREY = COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#000000", "#8c8c8c",
)  # fmt: skip
# One for each colour, so that lines can be told apart without colours.
DASHES = ("-", "--", "-.", (0, (1, 1.2)), (0, (5, 1, 1, 1, 1, 1)), "-", "--", "-.")
# A wide light line, to be drawn below a thin dark one that should cover it.
WIDE = {"color": "#9ccbe8", "linewidth": 6}

STYLE = {
    "figure.facecolor": "white",  # opaque, also on a dark page
    "axes.facecolor": "white",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "figure.titlesize": 12,
    "font.size": 9,
    "grid.color": "#e6e6e6",
    "legend.fontsize": 8,
    "legend.framealpha": 0.9,
    "lines.linewidth": 1.5,
}


class Example:
    """One run of an example.

    Args:
        description: Text of ``--help``: the script's docstring.
        arguments: The command line's; None takes the process's own.
    """

    def __init__(self, description: str | None, arguments: Sequence[str] | None = None) -> None:
        parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        add = parser.add_argument
        add("--out", type=Path, default=Path("build/examples"), metavar="DIR",
            help="folder for the pictures (default: %(default)s)")  # fmt: skip
        add("--tensorboard", type=Path, metavar="DIR",
            help="folder for TensorBoard logs of what is drawn (default: no logs)")  # fmt: skip
        add("--short", action="store_true", help="less work, for tests: the same claims")
        options = parser.parse_args(arguments)
        self.short: bool = options.short
        self.out: Path = options.out
        self.console = Console(highlight=False)
        self.console.width = max(self.console.width, 116)  # narrower tables lose digits
        self._writer: Any = None
        self._claims: list[tuple[str, bool, str]] = []
        if options.tensorboard is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                parser.error("--tensorboard: needs tensorboard; run: pip install tensorboard")
            self._writer = SummaryWriter(str(options.tensorboard))
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--out: cannot write to {self.out}: {error}; wanted: a folder")
        pyplot.rcParams.update(STYLE)
        torch.set_num_threads(1)  # the problems are too small for two

    def track(self, items: Iterable[T], label: str) -> Iterable[T]:
        """Yields the items and advances a progress bar, in a terminal.

        The bar is drawn between items only: a thread that redraws it would disturb timed steps.
        """
        disable = not self.console.is_terminal
        return track([*items], label, console=self.console, auto_refresh=False, transient=True,
                     disable=disable)  # fmt: skip

    def curve(
        self, axes: Axes, tag: str, steps: Sequence[int], values: Iterable[float], **style: Any
    ) -> None:
        """Draws and logs values over steps.

        Args:
            axes: Where to draw.
            tag: Name in TensorBoard; ``/`` separates folders.
            steps: Whole numbers, one for each value.
            values: Numbers.
            **style: Of matplotlib's ``plot``.
        """
        values = [float(value) for value in values]
        self._draw(axes, tag, steps, values, {"": values}, style)

    def path(self, axes: Axes, tag: str, points: Iterable[Sequence[float]], **style: Any) -> None:
        """Draws a path through points of the plane, and logs both coordinates over the steps."""
        x, y = ([float(value) for value in values] for values in zip(*points, strict=True))
        self._draw(axes, tag, x, y, {"/x": x, "/y": y}, style)

    def _draw(
        self, axes: Axes, tag: str, x: Sequence[float], y: Sequence[float],
        logged: dict[str, list[float]], style: dict[str, Any],
    ) -> None:  # fmt: skip
        tag = re.sub(r"[^\w./-]+", "_", tag)
        axes.plot(x, y, gid=tag, **style)
        if self._writer is not None:
            for end, values in logged.items():
                for step, value in zip(x if end == "" else range(len(x)), values, strict=True):
                    self._writer.add_scalar(tag + end, value, int(step))

    def save(self, figure: Figure, name: str, **layout: Any) -> None:
        """Writes a picture ``<name>.png``, logs it, and closes it."""
        figure.tight_layout(**layout)
        drawn, path = io.BytesIO(), self.out / f"{name}.png"
        figure.savefig(drawn, dpi=110)
        if self._writer is not None:
            self._writer.add_figure(name, figure, close=False)
        pyplot.close(figure)
        # A palette makes the file a third as large, without a visible difference.
        picture = Image.open(drawn).convert("RGB")
        picture.quantize(kmeans=2, dither=Image.Dither.NONE).save(path, optimize=True)
        self.console.print(f"Picture: {path}", soft_wrap=True)

    def table(
        self, title: str, headers: Sequence[str], rows: Iterable[Sequence[str]],
        justify: Literal["left", "right"] = "right",
    ) -> None:  # fmt: skip
        """Prints a table with a left-aligned first column."""
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for index, header in enumerate(headers):
            table.add_column(header, justify="left" if index == 0 else justify, overflow="fold")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def claim(self, what: str, holds: bool, found: str) -> None:
        """Records whether a statement about the pictures holds.

        Args:
            what: The statement.
            holds: Whether it holds. Write comparisons so that NaN makes them False.
            found: What was measured.
        """
        self._claims.append((what, bool(holds), found))

    def finish(self) -> int:
        """Prints the claims; returns the exit status, 1 if one does not hold or none was made."""
        if self._writer is not None:
            self._writer.close()
        marks = {True: "[green]PASS[/]", False: "[bold red]FAIL[/]"}
        rows = [(marks[holds], what, found) for what, holds, found in self._claims]
        self.table("Claims", ("", "claim", "found"), rows, "left")
        failed = [what for what, holds, _ in self._claims if not holds]
        if self._claims and not failed:
            return 0
        said = "; ".join(failed) or "nothing was claimed"
        print(f"{len(failed)} of {len(self._claims)} claims fail: {said}", file=sys.stderr)
        return 1


def plain_numbers(axes: Axes) -> None:
    """Labels a logarithmic vertical axis of few decades with numbers instead of powers."""
    shown = LogFormatter(minor_thresholds=(2, 0.6))  # says which minor ticks have room for a label
    shown.set_axis(axes.yaxis)

    def minor(value: float, place: int | None) -> str:
        shown.set_locs(axes.yaxis.get_minorticklocs())
        return f"{value:g}" if shown(value, place) else ""

    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(minor))
