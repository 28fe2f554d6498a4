"""`grip-hf pareto`: accuracy and time of every method in one picture and one table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..files import write_json, write_text, write_whole
from .screen import JsonFile, console, in_folder, say

POINTS = ("selector", "keep", "visual tokens", "accuracy, %", "TTFT, ms", "frontier")
SAVINGS = ("selector", "median saving", "largest saving", "at accuracy, %", "against", "compared from, %", "to, %")


def pareto(
    accuracy: Annotated[list[Path], typer.Option(help="File of `grip-hf eval --json`; may be given several times.")],
    latency: Annotated[list[Path], typer.Option(help="File of `grip-hf bench --json`; may be given several times.")],
    output: Annotated[
        Path, typer.Option(callback=in_folder, help="Where to write: .png, .svg and .md are added.")
    ] = Path("pareto"),
    json_file: JsonFile = None,
) -> None:
    """Draw accuracy against tokens and time, and tell the time that each method saves at equal accuracy."""
    from ..errors import GripError
    from ..evaluation.budgets import label
    from ..evaluation.pareto import frontier, join, merge, savings, scorers

    try:
        from ..evaluation.plot import draw_pareto

        judged, timed = merge([_read(file) for file in accuracy]), [_read(file) for file in latency]
        points, trained = join(judged, timed), scorers(judged)
        figure = draw_pareto(points, f"TTFT of the shape '{timed[0]['setting']['model']}', ms", trained)
    except (GripError, ImportError) as error:
        raise typer.BadParameter(str(error)) from error
    best, saved = frontier(points, "ms"), savings(points, trained)
    tables: dict[str, list[Sequence[str]]] = {
        f"accuracy: {judged.get('meta', {}).get('model')}; time: {timed[0]['setting']['model']}": [
            POINTS,
            *(
                (
                    point.selector,
                    label(point.budget),
                    f"{point.tokens}",
                    f"{100 * point.accuracy:.1f}",
                    "-" if point.ms is None else f"{point.ms:.1f}",
                    "yes" if point in best else "",
                )
                for point in points
            ),
        ],
        "time to first token saved at equal accuracy, against the best other method": [
            SAVINGS,
            *(
                (
                    one.selector,
                    f"{one.median:+.1%}",
                    f"{one.largest:+.1%}",
                    f"{100 * one.accuracy:.1f}",
                    one.rival,
                    f"{100 * one.low:.1f}",
                    f"{100 * one.high:.1f}",
                )
                for one in saved
            ),
        ],
    }
    for title, rows in tables.items():
        console.print(_rich(title, rows))
    for kind in ("png", "svg"):
        write_whole(output.with_name(f"{output.name}.{kind}"), partial(figure.savefig, dpi=200))
    text = "\n\n".join(f"**{title}**\n\n{_markdown(rows)}" for title, rows in tables.items())
    write_text(output.with_name(f"{output.name}.md"), text + "\n")
    say(f"written to {output}.png, {output}.svg and {output}.md")
    if json_file is not None:
        data = {
            "accuracy": judged.get("meta", {}),
            "time": timed[0]["setting"],
            "points": [{**dataclasses.asdict(point), "frontier": point in best} for point in points],
            "savings": [dataclasses.asdict(one) for one in saved],
        }
        write_json(json_file, data)


def _read(file: Path) -> Any:
    """The JSON in a file; raises `ConfigError` if there is none."""
    from ..errors import ConfigError

    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}") from error


def _rich(title: str, rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title)
    for number, heading in enumerate(rows[0]):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows[1:]:
        table.add_row(*row)
    return table


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["--:"] * (len(rows[0]) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:]))
