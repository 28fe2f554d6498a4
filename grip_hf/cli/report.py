"""Evaluations for people and for programs: a table on the screen, the same as JSON, and one line per answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..evaluation.answers import AGREEMENT
from ..evaluation.budgets import label
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
    if not agreement and found.unpruned < NEAR_ZERO:
        say(
            f"Warning: with all visual tokens the model scores {100 * found.unpruned:.1f} %: what pruning costs "
            "cannot be seen. Look at its answers (--log-samples FILE); perhaps another --metric fits them"
        )


def _cell(row: Any) -> str:
    low, high = row["ci95"]
    return f"{100 * row['accuracy']:.1f}\n{100 * low:.1f}–{100 * high:.1f}"


def write_table(path: Path, found: Evaluation, meta: dict[str, Any]) -> None:
    """Write `{"meta": ..., "rows": [...]}` as JSON; raises `FileError`."""
    write_json(path, {"meta": {**meta, "metric": found.metric}, "rows": found.rows})


def write_samples(path: Path, found: Evaluation) -> None:
    """Write every answer as a line of JSON; raises `FileError`."""

    def write(new: Path) -> None:
        with new.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in found.samples())

    write_whole(path, write)
