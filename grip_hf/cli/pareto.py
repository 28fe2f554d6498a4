"""`grip-hf pareto`: accuracy and time of every method in one picture and one table."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..files import write_json, write_text, write_whole
from ..tables import Column, Table
from .screen import JsonFile, console, in_folder, say


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


POINTS = (
    Column("selector", "selector", left=True),
    Column("keep", "keep"),
    Column("visual tokens", "tokens"),
    Column("accuracy, %", "accuracy", _percent),
    Column("TTFT, ms", "ms", "{:.1f}"),
    Column("frontier", "best"),
)
SAVINGS = (
    Column("selector", "selector", left=True),
    Column("median saving", "median", "{:+.1%}"),
    Column("largest saving", "largest", "{:+.1%}"),
    Column("at accuracy, %", "accuracy", _percent),
    Column("against", "rival"),
    Column("compared from, %", "low", _percent),
    Column("to, %", "high", _percent),
)


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
    held = {"accuracy": judged.get("meta", {}), "time": timed[0]["setting"]}
    tables = (
        Table(
            POINTS,
            [
                {**dataclasses.asdict(point), "keep": label(point.budget), "best": "yes" if point in best else ""}
                for point in points
            ],
            f"accuracy: {held['accuracy'].get('model')}; time: {held['time']['model']}",
        ),
        Table(
            SAVINGS,
            [dataclasses.asdict(one) for one in saved],
            "time to first token saved at equal accuracy, against the best other method",
        ),
    )
    for table in tables:
        console.print(table.rich())
    for kind in ("png", "svg"):
        write_whole(output.with_name(f"{output.name}.{kind}"), partial(figure.savefig, dpi=200))
    text = "\n\n".join(table.markdown() for table in tables)
    write_text(output.with_name(f"{output.name}.md"), text + "\n")
    say(f"written to {output}.png, {output}.svg and {output}.md")
    if json_file is not None:
        data = {
            **held,
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
