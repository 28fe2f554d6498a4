"""What a promise takes until the first token that stands, from what each budget takes. Plain numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..quality.doubt import FIRST


@dataclasses.dataclass(frozen=True)
class Times:
    """What a model takes, in milliseconds.

    Attributes:
        ttft: By budget, the time to the first token, encoding the picture included.
        vision: The time to encode the picture, which is done once.
        decode: By budget, the time of a further token.
    """

    ttft: Sequence[float]
    vision: float
    decode: Sequence[float]


def first_token(times: Times, rungs: Sequence[int], reached: Sequence[float], length: float, rule: str) -> float:
    """The mean time to the first token of the answer that stands.

    Args:
        times: What each budget takes.
        rungs: Numbers of a ladder's budgets.
        reached: The share of rows that come to each rung; the first is 1.
        length: Mean tokens of an answer. By the whole answer one has to be written before it is doubted, to its end
            at most; by its first token there is nothing to wait for.
        rule: By which rule.
    """
    total = times.vision
    for place, (rung, share) in enumerate(zip(rungs, reached, strict=True)):
        total += share * (times.ttft[rung] - times.vision)
        if rule != FIRST and place + 1 < len(rungs):
            total += reached[place + 1] * (length - 1) * times.decode[rung]
    return total
