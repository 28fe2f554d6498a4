"""One table, written three ways: on the screen by rich, as Markdown, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .files import write_json as write_json

if TYPE_CHECKING:
    from rich.table import Table as RichTable

ABSENT = "-"


@dataclasses.dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        heading: What stands above it.
        key: Name of its value in a row.
        form: How a value is written: a format string such as "{:.1%}", or a function.
        left: Whether it holds words, which stand on the left; figures stand on the right.
    """

    heading: str
    key: str
    form: str | Callable[[Any], str] = "{}"
    left: bool = False

    def cell(self, row: Mapping[str, Any]) -> str:
        """The value of a row as text; "-" where it has none."""
        value = row.get(self.key)
        if value is None:
            return ABSENT
        return self.form(value) if callable(self.form) else self.form.format(value)


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under headings.

    Attributes:
        columns: The columns, from the left.
        rows: Plain data: what `write_json` writes; a row may hold more than the columns show.
        title: What it shows.
        style: Gives the rich style of a row on the screen, or None.
    """

    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    title: str = ""
    style: Callable[[Mapping[str, Any]], str | None] = lambda row: None

    def cells(self) -> list[list[str]]:
        """The text of every cell, row by row, without the headings."""
        return [[column.cell(row) for column in self.columns] for row in self.rows]

    def rich(self) -> RichTable:
        """For `rich.console.Console.print`."""
        from rich.table import Table as RichTable

        table = RichTable(title=self.title or None)
        for column in self.columns:
            table.add_column(column.heading, justify="left" if column.left else "right")
        for row, cells in zip(self.rows, self.cells(), strict=True):
            table.add_row(*cells, style=self.style(row))
        return table

    def markdown(self) -> str:
        """A table of GitHub's Markdown, the title in bold above it; without a newline at the end."""
        rule = ["---" if column.left else "--:" for column in self.columns]
        lines = [[column.heading for column in self.columns], rule, *self.cells()]
        text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"**{self.title}**\n\n{text}" if self.title else text


def pivot(
    rows: Iterable[Mapping[str, Any]],
    columns: Callable[[Any], str],
    form: Callable[[Mapping[str, Any]], str],
    index: str = "selector",
    by: str = "budget",
    title: str = "",
) -> Table:
    """A table with one line per value of `index` and one column per value of `by`, both in the order of the rows.

    Args:
        rows: Rows of which each (index, by) has at most one; the others stay empty.
        columns: Gives the heading from a value of `by`.
        form: Gives the text of a cell from its row.
        index: Name of what tells the lines apart.
        by: Name of what tells the columns apart.
        title: Title of the table.
    """
    found = {(row[index], row[by]): row for row in rows}
    across = dict.fromkeys(key for _, key in found)
    lines = [
        {index: name, **{str(key): found.get((name, key)) for key in across}}
        for name in dict.fromkeys(name for name, _ in found)
    ]
    headings = [Column(index, index, left=True), *(Column(columns(key), str(key), form) for key in across)]
    return Table(headings, lines, title)
