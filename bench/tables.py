"""What a table is: columns of functions over rows; and the three ways to write one.

A `Table` is printed with rich, written as Markdown, or handed to the page's template.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import rows as results
from .providers import title_of
from .rows import BEST, CANDIDATE, Row, label

ABSENT = "-"
# Styles of a line, as rich has them.
RICH = {"ours": "bold", "bad": "red", "good": "blue", "dim": "dim", "": ""}

# A column's head, and what its cell says of an item; None is a cell without a figure.
Column = tuple[str, Callable[[Any], str | None]]


@dataclass
class Table:
    """Heads of columns of words and of numbers, and lines of as many cells, with a style each."""

    title: str
    words: Sequence[str]
    numbers: Sequence[str] = ()
    lines: list[tuple[list[str], str]] = field(default_factory=list)

    @property
    def heads(self) -> list[str]:
        """Of all columns."""
        return [*self.words, *self.numbers]

    def to_rich(self) -> Any:
        """For a console."""
        from rich import box
        from rich.table import Table as RichTable

        made = RichTable(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
        for head in self.words:
            made.add_column(head, vertical="bottom", no_wrap=bool(self.numbers))
        for head in self.numbers:
            head = head.replace(" ", "\n")
            made.add_column(head, justify="right", vertical="bottom", no_wrap=True)
        for cells, style in self.lines:
            made.add_row(*cells, style=RICH[style])
        return made

    def to_markdown(self) -> str:
        """For a page of the documentation, without the title."""
        rule = "|" + "---|" * len(self.words) + "---:|" * len(self.numbers)
        lines = [f"| {' | '.join(cells)} |" for cells, _ in [(self.heads, ""), *self.lines]]
        return "\n".join([lines[0], rule, *lines[1:]])


def table(
    title: str, items: Iterable[Any], words: Sequence[Column], numbers: Sequence[Column] = (),
    style: Callable[[Any], str] = lambda item: "",
) -> Table:  # fmt: skip
    """A line an item, of what each column says of it."""
    made = Table(title, [head for head, _ in words], [head for head, _ in numbers])
    for item in items:
        cells = [cell(item) for _, cell in (*words, *numbers)]
        made.lines.append(([ABSENT if cell is None else cell for cell in cells], style(item)))
    return made


# ---- cells ----


def number(value: float | None, digits: int = 3) -> str | None:
    """So many significant digits, all before the point."""
    if value is None:
        return None
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def times(value: float | None, digits: int = 2) -> str | None:
    """A ratio."""
    return None if value is None else f"{value:.{digits}f}x"


def column(head: str, key: str, form: str | Callable[[Any], Any] = number) -> Column:
    """What a row has under a key, if anything, by a function or a format."""
    write = form.format if isinstance(form, str) else form
    return head, lambda row: None if row.get(key) is None else write(row[key])


def of_group(key: Any, cell: Callable[[Row], str | None], head: str) -> Column:
    """A cell of one row of a group, whose rows are found by what makes them differ."""
    return head, lambda told: cell(told[key]) if key in told else None


MS = column("ms", "ms")
OF_FLOOR = column("% of floor", "floor_share", lambda share: f"{100 * share:.0f}")


def nanoseconds(row: Row) -> str | None:
    """Of a step, a parameter."""
    return number(results.nanoseconds(row))


def bandwidth(row: Row) -> str | None:
    """GB/s."""
    return number(results.bandwidth(row))


def is_ours(row: Row) -> str:
    """The style of fusedopt's lines."""
    return "ours" if row["provider"] == CANDIDATE else ""


def against(baseline: str) -> str:
    """A baseline in words."""
    return "torch's fastest step" if baseline == BEST else title_of(baseline)


def compared(ratio: float) -> str:
    """A ratio of times in words, such as ``7.9x faster than``."""
    if 0.95 < ratio < 1.05:
        return "as fast as"
    return f"{ratio:.1f}x faster than" if ratio >= 1 else f"{1 / ratio:.1f}x slower than"


OPTIMIZER: Column = ("optimizer", label)
PROVIDER: Column = ("provider", lambda row: title_of(row["provider"]))
WORKLOAD: Column = ("workload", lambda row: row["workload"])


def by_provider(rows: Iterable[Row], *more: str) -> list[dict[str, Row]]:
    """The rows of each workload and optimizer by their providers; "" is any of them."""
    groups = results.grouped(rows, *more, "workload", "optimizer", "dtype").values()
    return [{"": found[0], **results.by(found, "provider")} for found in groups]


KIND: list[Column] = [
    ("workload", lambda told: told[""]["workload"]),
    ("optimizer", lambda told: label(told[""])),
]
