"""From right and wrong answers to accuracies with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

Z95 = 1.959963984540054
MEAN = "mean"
UNPRUNED = "unpruned"


class Row(TypedDict):
    """One line of an evaluation table; `ci95` is (low, high), `budget` the keep ratio."""

    selector: str
    budget: float
    task: str
    accuracy: float
    n: int
    ci95: tuple[float, float]


def wilson(right: int, n: int) -> tuple[float, float]:
    """The Wilson score interval of a proportion at 95 %.

    Raises:
        ValueError: Not 0 <= right <= n with n >= 1.
    """
    if not 0 <= right <= n or n < 1:
        raise ValueError(f"right={right} of n={n} is no proportion")
    share, square = right / n, Z95**2
    centre = (share + square / (2 * n)) / (1 + square / n)
    half = Z95 * math.sqrt(share * (1 - share) / n + square / (4 * n * n)) / (1 + square / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def table(answers: Mapping[tuple[str, float], Mapping[str, Sequence[bool]]], tasks: Iterable[str]) -> list[Row]:
    """Rows per selector, budget and task, and one for the mean over tasks.

    Args:
        answers: For each (selector, budget) the answers of each task, True where right.
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


def _mean(selector: str, budget: float, counts: Sequence[tuple[int, int]]) -> Row:
    """The mean of the tasks' accuracies; its interval adds up their Agresti-Coull variances, which are never 0."""
    mean = sum(right / n for right, n in counts) / len(counts)
    smooth = [((right + 2) / (n + 4), n + 4) for right, n in counts]
    half = Z95 * math.sqrt(sum(p * (1 - p) / n for p, n in smooth)) / len(counts)
    bounds = (max(0.0, mean - half), min(1.0, mean + half))
    total = sum(n for _, n in counts)
    return Row(selector=selector, budget=budget, task=MEAN, accuracy=mean, n=total, ci95=bounds)
