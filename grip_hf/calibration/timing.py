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
        vision: By budget, the time to encode the picture.
        decode: By budget, the time of a further token.
        encodings: By budget, the number of the encoding that a look uses, since looks at which the same rows stay in
            the vision tower share one; None if all looks do.
    """

    ttft: Sequence[float]
    vision: Sequence[float]
    decode: Sequence[float]
    encodings: Sequence[int] | None = None


def encodes(encodings: Sequence[int] | None, rungs: Sequence[int]) -> list[bool]:
    """By rung of a ladder, whether a look at it encodes the picture: the first, and each that needs another one."""
    found = [0 if encodings is None else encodings[rung] for rung in rungs]
    return [place == 0 or number != found[place - 1] for place, number in enumerate(found)]


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
    total = 0.0
    for place, (rung, share, new) in enumerate(zip(rungs, reached, encodes(times.encodings, rungs), strict=True)):
        total += share * (times.ttft[rung] - (0.0 if new else times.vision[rung]))
        if rule != FIRST and place + 1 < len(rungs):
            total += reached[place + 1] * (length - 1) * times.decode[rung]
    return total
