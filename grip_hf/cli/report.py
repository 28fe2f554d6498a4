"""Evaluations for people and for programs: a table on the screen, the same as JSON, and one line per answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..evaluation.answers import AGREEMENT
from ..evaluation.budgets import label
from ..evaluation.columns import HARD
from ..evaluation.metrics import MEAN, UNPRUNED
from ..evaluation.runner import Evaluation
from ..files import write_json, write_whole
from ..tables import pivot
from .screen import console, say

NEAR_ZERO = 0.05


def show(found: Evaluation) -> None:
    """Print the means over tasks, selectors by budgets, and the unpruned model's score on each task."""
    means = [row for row in found.rows if row["task"] == MEAN and row["selector"] != UNPRUNED]
    full = [f"{row['task']} {100 * row['accuracy']:.1f}" for row in found.rows if row["selector"] == UNPRUNED]
    agreement = found.metric == AGREEMENT
    say(f"{found.metric}; all visual tokens, in %: {', '.join(full)}")
    title = f"{found.metric} in %, mean over tasks; below it, its two-sided 95 % interval"
    console.print(pivot(means, label, _cell, title=title).rich())
    hard = [row for row in found.rows if row["task"] == HARD and row["selector"] != UNPRUNED]
    if hard:
        title = f"the same on {HARD}: right with all tokens, wrong with a smaller picture of that budget; their number"
        console.print(pivot(hard, label, _hard, title=title).rich())
    costs: list[Any] = [row for row in means if "compute" in row]
    if len({(row["budget"], row["compute"]) for row in costs}) > len({row["budget"] for row in costs}):
        title = "token-layers of the language model's prefill, in % of unpruned"
        named: list[dict[str, Any]] = [{**row, "selector": _named(row)} for row in costs]
        console.print(pivot(named, label, _share, title=title).rich())
    errors: list[Any] = [row for row in means if "ece" in row]
    if errors:
        whole = next(row["ece"] for row in found.rows if row["selector"] == UNPRUNED and "ece" in row)
        title = f"expected calibration error, in %; all visual tokens: {100 * whole:.1f}"
        console.print(pivot(errors, label, lambda row: f"{100 * row['ece']:.1f}", title=title).rich())
    if not agreement and found.unpruned < NEAR_ZERO:
        say(
            f"Warning: with all visual tokens the model scores {100 * found.unpruned:.1f} %: what pruning costs "
            "cannot be seen. Look at its answers (--log-samples FILE); perhaps another --metric fits them"
        )


def _cell(row: Any) -> str:
    low, high = row["ci95"]
    return f"{100 * row['accuracy']:.1f}\n{100 * low:.1f}–{100 * high:.1f}"


def _hard(row: Any) -> str:
    return f"{_cell(row)}\nof {row['n']}"


def _share(row: Any) -> str:
    return f"{100 * row['compute']:.1f}"


def _named(row: Any) -> str:
    """A selector with the layers from which it lacks tokens, if it drops inside the language model."""
    if "drops" not in row:
        return str(row["selector"])
    return f"{row['selector']} (drops at {', '.join(map(str, row['drops']))} of {row['layers']} layers)"


def write_table(path: Path, found: Evaluation, meta: dict[str, Any]) -> None:
    """Write `{"meta": ..., "rows": [...]}` as JSON; raises `FileError`."""
    write_json(path, {"meta": {**meta, "metric": found.metric}, "rows": found.rows})


def write_samples(path: Path, found: Evaluation) -> None:
    """Write every answer as a line of JSON; raises `FileError`."""

    def write(new: Path) -> None:
        with new.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in found.samples())

    write_whole(path, write)
