"""A calibration for people: its promises and its curve as tables, and in words for a card."""

from __future__ import annotations

from collections.abc import Sequence

from ..tables import Column, Table
from .identity import told
from .promise import Calibration, Promise

UNITS = {"answer": "whole answers", "token": "tokens"}


def label(rung: float | int) -> str:
    """A budget in words."""
    return (
        f"{rung} tokens" if isinstance(rung, int) and rung > 1 else "all" if rung == 1 else f"{rung:.3g}".rstrip("0")
    )


def ladder(promise: Promise) -> str:
    """The budgets of a promise, and what sends an answer from one to the next."""
    told = [label(promise.ladder[0])]
    for threshold, rung in zip(promise.thresholds, promise.ladder[1:], strict=True):
        told.append(f"below {threshold:.3f}: {label(rung)}")
    return ", ".join(told)


def promises(found: Calibration) -> Table:
    """The promises of a calibration."""
    rows = [{**vars(one), "ladder": ladder(one)} for one in found.promises]
    columns = (
        Column("promise", "quality", "{:.1%}"),
        Column("judged by", "rule", left=True),
        Column("budgets", "ladder", left=True),
        Column("mean tokens", "tokens", "{:.1f}"),
        Column("looked again", "again", "{:.1%}"),
        Column("agreement", "agreement", "{:.2%}"),
    )
    first = found.promises[0]
    title = f"each with {first.confidence:.0%} confidence; seen on the {first.rows} rows that tested them"
    return Table(columns, rows, title)


def curve(found: Calibration) -> Table:
    """What one budget for all rows is worth."""
    columns: Sequence[Column] = (
        Column("one budget for all", "budget", label, left=True),
        Column("mean tokens", "tokens", "{:.1f}"),
        Column("agreement", "agreement", "{:.2%}"),
        Column("at least", "at_least", "{:.2%}"),
        Column("accuracy", "accuracy", "{:.2%}"),
        Column("ms per answer", "ms", "{:.1f}"),
    )
    return Table(columns, list(found.curve), f"{found.data.get('rows')} rows; unit: {found.unit}")


def describe(found: Calibration | None) -> str:
    """What is promised, as Markdown."""
    if found is None:
        return "None: `grip-hf calibrate` finds out on your own data what can be promised."
    made = ", ".join(f"{name} {number}" for name, number in found.versions.items())
    data = f"{found.data.get('dataset', 'unknown data')}, {found.data.get('rows')} questions about different pictures"
    unit = UNITS.get(found.unit, f"agreement by `{found.unit}`")
    most = max(one.quality for one in found.promises)
    tower = found.made_for.get("tower")
    rows = "" if tower is None else f" At looks at fewer than all tokens, the vision tower is {told('tower', tower)}."
    return (
        f"`apply_grip(model, scorer=..., quality={most:g})` lets `generate` answer at few visual tokens, and again at "
        f"more where it is in doubt, so that {unit} are as with all tokens as often as promised, on data like that of "
        f"the calibration: {data}, at most {found.max_new_tokens} new tokens, greedy.{rows}\n\n"
        f"{promises(found).markdown()}\n\n{curve(found).markdown()}\n\nMade with {made}."
    )
