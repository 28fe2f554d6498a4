"""Rewards of keep-sets: plain functions from what the rollout found out to one number per completion.

Each gets `completion_ids` (the picks), `budget`, `keep_ratio`, `kl`, `correct`, `log_prob`, `confidence` (a log-prob
too, of what is predicted), `predicted` (text) and the columns of the dataset as lists with one entry per completion,
and returns as many floats. Write your own alike.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import RewardError as RewardError

Reward = Callable[..., Sequence[float]]
KL_LIMIT = 5.0
# A look is taken again below this probability; a wrong answer without one costs as much as so many second looks.
SURE, WRONG = 0.9, 5.0
BUCKETS = (0.05, 0.11, 0.25, 1.0)


def closeness(kl: Sequence[float], **kwargs: Any) -> list[float]:
    """-KL(full || pruned) on the answer's positions, at least -`KL_LIMIT`, because its tail is heavy."""
    return [-min(value, KL_LIMIT) for value in kl]


def correctness(correct: Sequence[bool], keep_ratio: Sequence[float], **kwargs: Any) -> list[float]:
    """1 if the pruned model would write exactly the reference answer, else 0; reports agreement per budget."""
    log = kwargs.get("log_metric")
    if log is not None:
        for low, high in zip((0.0, *BUCKETS), BUCKETS, strict=False):
            inside = [float(c) for c, ratio in zip(correct, keep_ratio, strict=True) if low < ratio <= high]
            if inside:
                log(f"agreement/keep_{high:g}", sum(inside) / len(inside))
    return [float(value) for value in correct]


def likelihood(log_prob: Sequence[float], **kwargs: Any) -> list[float]:
    """Probability of the reference answer: bounded, unlike its logarithm."""
    return [math.exp(value) for value in log_prob]


def ladder(correct: Sequence[bool], confidence: Sequence[float], **kwargs: Any) -> list[float]:
    """What an answer is worth to one who looks again when in doubt, as `GripConfig(quality=...)` does.

    1 if it is right and at least `SURE`, so that one look is enough; 0 if it is in doubt, right or wrong, since
    another look decides; -`WRONG` if it is wrong and nobody would know.
    """
    sure = [math.exp(value) >= SURE for value in confidence]
    return [(1.0 if right else -WRONG) if certain else 0.0 for right, certain in zip(correct, sure, strict=True)]


REWARDS: dict[str, Reward] = {
    "closeness": closeness,
    "correctness": correctness,
    "likelihood": likelihood,
    "ladder": ladder,
}


def checked(reward: Reward) -> Reward:
    """Wrap a reward function so that a wrong answer stops training with a clear error.

    TRL takes NaN as "does not apply", which would hide a broken reward.
    """

    @functools.wraps(reward)
    def wrapper(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        name = getattr(reward, "__name__", type(reward).__name__)
        values = reward(completion_ids=completion_ids, **columns)
        if not isinstance(values, Sequence) or len(values) != len(completion_ids):
            got = f"{len(values)} values" if isinstance(values, Sequence) else type(values).__name__
            raise RewardError(f"reward {name!r} must return a list of {len(completion_ids)} numbers, got {got}")
        for place, value in enumerate(values):
            if isinstance(value, str) or value is None or not math.isfinite(value):
                raise RewardError(f"reward {name!r} returned {value!r} for completion {place}; rewards must be finite")
        return [float(value) for value in values]

    return wrapper
