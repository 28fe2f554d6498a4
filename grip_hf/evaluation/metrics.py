"""From right and wrong answers to accuracies with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist, mean, stdev
from typing import TypedDict

LEVEL = 0.95
MEAN = "mean"
UNPRUNED = "unpruned"


class _Row(TypedDict):
    selector: str
    budget: float
    task: str
    accuracy: float
    n: int
    ci95: tuple[float, float]


class Row(_Row, total=False):
    """One line of an evaluation table.

    Attributes:
        selector: What chose the tokens.
        budget: The keep ratio.
        task: The task, or "mean" over the tasks.
        accuracy: Share of right answers; over several trainings of a selector, the mean of theirs.
        n: Number of examples.
        ci95: (low, high), an interval over the examples, and over trainings where there are several.
        seeds: The accuracy of each training, where there are several.
        compute: Of rows over the task "mean": token-layers of the language model's prefill, as a share of those
            without pruning, mean over the questions.
        drops: For selectors inside the language model, the first layer without the dropped tokens, drop by drop.
        layers: And the number of its layers.
        ece: Expected calibration error, where it was asked for; over several trainings, the mean of theirs.
    """

    seeds: list[float]
    compute: float
    drops: list[int]
    layers: int
    ece: float


def wilson(right: float, n: int) -> tuple[float, float]:
    """The two-sided Wilson score interval of a proportion at 95 %.

    Graded scores may add up to no whole number: its neighbours then give the bounds. The interval is wide enough for
    them, since nothing in [0, 1] varies more than right and wrong answers of the same mean.

    Raises:
        ValueError: Not 0 <= right <= n with n >= 1.
    """
    if not 0 <= right <= n or n < 1:
        raise ValueError(f"right={right} of n={n} is no proportion")
    from scipy.stats import binomtest  # imported late: it takes longer than what it is asked for

    low, high = (
        binomtest(round_(right), n).proportion_ci(LEVEL, method="wilson") for round_ in (math.floor, math.ceil)
    )
    return float(low.low), float(high.high)


def table(answers: Mapping[tuple[str, float], Mapping[str, Sequence[float]]], tasks: Iterable[str]) -> list[Row]:
    """Rows per selector, budget and task, and one for the mean over tasks.

    Args:
        answers: For each (selector, budget) the scores of each task, in [0, 1].
        tasks: The order of the tasks.
    """
    rows = []
    for (selector, budget), by_task in answers.items():
        counts = {task: (sum(by_task[task]), len(by_task[task])) for task in tasks if by_task.get(task)}
        for task, (right, n) in counts.items():
            interval = wilson(right, n)
            rows.append(Row(selector=selector, budget=budget, task=task, accuracy=right / n, n=n, ci95=interval))
        rows.append(_mean(selector, budget, list(counts.values())))
    return rows


def _mean(selector: str, budget: float, counts: Sequence[tuple[float, int]]) -> Row:
    """The mean of the tasks' accuracies; its interval adds up their Agresti-Coull variances, which are never 0."""
    middle = mean(right / n for right, n in counts)
    smooth = [((right + 2) / (n + 4), n + 4) for right, n in counts]
    half = NormalDist().inv_cdf((1 + LEVEL) / 2) * math.sqrt(sum(p * (1 - p) / n for p, n in smooth)) / len(counts)
    bounds = (max(0.0, middle - half), min(1.0, middle + half))
    total = sum(n for _, n in counts)
    return Row(selector=selector, budget=budget, task=MEAN, accuracy=middle, n=total, ci95=bounds)


def average(tables: Sequence[Sequence[Row]]) -> list[Row]:
    """One table from those of several trainings of a selector, judged on the same examples.

    Half an interval adds up, as variances do, half the examples' interval (which trainings share) and Student's
    interval of the mean over trainings.

    Args:
        tables: Per training its rows, the same ones in the same order, at least one training.
    """
    if len(tables) == 1:
        return list(tables[0])
    from scipy.stats import t

    rows = []
    for same in zip(*tables, strict=True):
        found = [row["accuracy"] for row in same]
        examples = mean((row["ci95"][1] - row["ci95"][0]) / 2 for row in same)
        trainings = float(t.ppf((1 + LEVEL) / 2, len(found) - 1)) * stdev(found) / math.sqrt(len(found))
        middle, half = mean(found), math.hypot(examples, trainings)
        bounds = (max(0.0, middle - half), min(1.0, middle + half))
        row = same[0].copy()
        row.update(accuracy=middle, ci95=bounds, seeds=found)
        rows.append(row)
    return rows
