"""The same table on the screen, as Markdown and as JSON."""

import json

import pytest
from rich.console import Console

from grip_hf.tables import Column, Table, pivot, write_json

ROWS = [{"name": "a|b", "share": 0.256, "bytes": 2**21}, {"name": "c", "share": None, "bytes": 0, "more": [1]}]
COLUMNS = [Column("name", "name", left=True), Column("share, %", "share", "{:.1%}")]
COLUMNS += [Column("MiB", "bytes", lambda size: f"{size / 2**20:.1f}")]


def test_markdown():
    text = Table(COLUMNS, ROWS, "what").markdown()
    assert text.splitlines() == [
        "**what**",
        "",
        "| name | share, % | MiB |",
        "| --- | --: | --: |",
        "| a\\|b | 25.6% | 2.0 |",
        "| c | - | 0.0 |",
    ]
    assert Table(COLUMNS, []).markdown().count("\n") == 1


def test_the_screen_shows_the_same_cells():
    table = Table(COLUMNS, ROWS, "what", lambda row: "yellow" if row["share"] is None else None)
    rich = table.rich()
    assert [list(column.cells) for column in rich.columns] == list(map(list, zip(*table.cells(), strict=True)))
    assert [row.style for row in rich.rows] == [None, "yellow"]
    assert [column.justify for column in rich.columns] == ["left", "right", "right"]
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(rich)
    shown = console.export_text()
    assert all(cell in shown for cells in table.cells() for cell in cells)


def test_pivot_puts_one_key_across():
    rows = [{"selector": s, "budget": b, "right": r} for s, b, r in (("x", 0.5, 9), ("x", 0.1, 7), ("y", 0.1, 5))]
    table = pivot(rows, lambda budget: f"keep {budget:.0%}", lambda row: str(row["right"]))
    assert table.markdown().splitlines()[0] == "| selector | keep 50% | keep 10% |"
    assert table.cells() == [["x", "9", "7"], ["y", "-", "5"]]


def test_json_is_whole_or_the_old_one(tmp_path):
    path = tmp_path / "table.json"
    write_json(path, {"rows": ROWS})
    assert json.loads(path.read_text()) == {"rows": ROWS}
    with pytest.raises(TypeError):
        write_json(path, {"rows": {1, 2}})
    assert json.loads(path.read_text()) == {"rows": ROWS} and [p.name for p in tmp_path.iterdir()] == ["table.json"]
