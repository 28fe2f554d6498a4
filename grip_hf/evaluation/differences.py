"""Two methods on the same questions: by how much one is better, with an interval that their pairing makes narrow.

grip-hf eval ... --log-samples answers.jsonl
python -m grip_hf.evaluation.differences answers.jsonl grip "grip + tower 0.5"
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import mean
from typing import Any, NamedTuple

from scipy.stats import t

from ..errors import ConfigError


class Difference(NamedTuple):
    """How much better one method is than another at a budget: the mean of their questions' differences.

    Attributes:
        budget: The budget.
        mean: Score of the second minus that of the first, in [-1, 1].
        low: Lower end of its 95 % interval.
        high: Upper end.
        questions: How many questions both were asked.
    """

    budget: float
    mean: float
    low: float
    high: float
    questions: int


def differences(samples: Iterable[Mapping[str, Any]], first: str, second: str) -> list[Difference]:
    """Compare two methods question by question, at every budget that both were asked at.

    Args:
        samples: Lines of `grip-hf eval --log-samples`.
        first: Name of a method; "unpruned" is compared at every budget of the other.
        second: Name of the other.

    Raises:
        ConfigError: They share no two questions.
    """
    scores: dict[tuple[str, float], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in samples:
        scores[one["selector"], one["budget"]][one["row"]].append(one["score"])
    found = []
    for (name, budget), theirs in scores.items():
        mine = scores.get((first, 1.0 if first == "unpruned" else budget), {})
        rows = sorted(set(mine) & set(theirs))
        if name != second or len(rows) < 2:
            continue
        apart = [mean(theirs[row]) - mean(mine[row]) for row in rows]
        middle = mean(apart)
        spread = (sum((one - middle) ** 2 for one in apart) / (len(apart) - 1) / len(apart)) ** 0.5
        half = float(t.ppf(0.975, len(apart) - 1)) * spread
        found.append(Difference(budget, middle, middle - half, middle + half, len(rows)))
    if not found:
        known = sorted({name for name, _ in scores})
        raise ConfigError(f"{first!r} and {second!r} share no questions; there are {known}")
    return sorted(found, key=lambda one: -one.budget)
