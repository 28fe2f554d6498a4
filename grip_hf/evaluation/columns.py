"""What a table says beside the accuracy: hard questions, calibration, and what the language model computes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple

from .budgets import Budget
from .confidence import calibration_error
from .downsampling import DOWNSAMPLING
from .metrics import MEAN, UNPRUNED, Row, average, table

HARD = "group A"  # in place of a task
RIGHT = 0.5  # graded answers count as right from here on


class Mark(NamedTuple):
    """One answer: who gave it (which of several trainings), at which budget, to which question, how right it is.

    Attributes:
        compute: Token-layers of the language model's prefill, as a share of those without pruning; None if not known.
        confidence: Probability of what was said; None if not asked for.
    """

    selector: str
    training: int
    budget: Budget
    row: int
    task: str
    score: float
    said: str
    compute: float | None = None
    confidence: float | None = None


def held_share(method: Any, texts: int, visual: int, budget: Budget, depth: int) -> float | None:
    """Token-layers of a prompt's prefill, as a share of those without pruning; None if the method cannot tell.

    Args:
        method: Tells by `held(visual, budget, depth)` how many visual tokens each layer sees.
        texts: Text tokens of the prompt.
        visual: Its visual tokens without pruning.
        budget: The budget.
        depth: Layers of the language model.
    """
    held = getattr(method, "held", None)
    if held is None:
        return None
    return sum(texts + left for left in held(visual, budget, depth)) / (depth * (texts + visual))


def hard_questions(marks: Iterable[Mark]) -> dict[Budget, set[int]]:
    """By budget the questions that the unpruned model answers right, and a smaller picture of that budget wrong.

    VTC-Bench (arXiv 2510.07143) calls them its difficult group: those on which choosing tokens can show its worth.
    Empty where nobody asked with smaller pictures.
    """
    right, found = set[int](), defaultdict[Budget, set[int]](set)
    wrong: dict[Budget, set[int]] = {}
    for one in marks:
        if one.selector == UNPRUNED and one.score >= RIGHT:
            right.add(one.row)
        if one.selector == DOWNSAMPLING:
            wrong.setdefault(one.budget, set())
            if one.score < RIGHT:
                wrong[one.budget].add(one.row)
    for budget, rows in wrong.items():
        found[budget] = rows & right
    return dict(found)


def with_columns(
    rows: Sequence[Row], marks: Sequence[Mark], drops: Mapping[str, Sequence[int]], depth: int
) -> list[Row]:
    """The rows of a table with what can be said beside accuracies.

    Args:
        rows: The table; its rows over the task "mean" are given `compute`, `ece`, `drops` and `layers`.
        marks: Every answer.
        drops: By selector the first layer that lacks tokens, drop by drop, for those inside the language model.
        depth: Layers of the language model.

    Returns:
        The rows, followed by one over the task "group A" for each selector and budget at which there is one.
    """
    several: dict[tuple[str, Budget], dict[int, list[Mark]]] = defaultdict(lambda: defaultdict(list))
    for one in marks:
        several[one.selector, one.budget][one.training].append(one)
    hard, found, more = hard_questions(marks), [], []
    for row in rows:
        trainings = list(several.get((row["selector"], row["budget"]), {}).values())
        found.append(row.copy())
        if row["task"] != MEAN or not trainings:
            continue
        compute = [one.compute for one in trainings[0]]
        if None not in compute:
            found[-1]["compute"] = mean(one for one in compute if one is not None)
        errors = [error for answers in trainings if (error := _calibration(answers)) is not None]
        if errors:
            found[-1]["ece"] = mean(errors)
        if row["selector"] in drops:
            found[-1]["drops"], found[-1]["layers"] = list(drops[row["selector"]]), depth
        asked = hard.get(row["budget"])
        if asked:
            chosen = [[one.score for one in answers if one.row in asked] for answers in trainings]
            key = (row["selector"], row["budget"])
            tables = [
                [one for one in table({key: {HARD: scores}}, [HARD]) if one["task"] == HARD] for scores in chosen
            ]
            more += average(tables)
    return found + more


def _calibration(answers: Sequence[Mark]) -> float | None:
    sure = [one.confidence for one in answers if one.confidence is not None]
    return calibration_error(sure, [one.score for one in answers]) if len(sure) == len(answers) else None
