"""Answers of several looks at a batch, put together row by row as if `generate` had given them at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine.call import LastCall
from ..engine.upstream import CACHE_NAMES


@dataclasses.dataclass(frozen=True)
class LastLook(LastCall):
    """What the last `generate` with a quality kept, row by row at the look that its answer comes from.

    Attributes:
        looks: per sample, how often it was looked at.
        confidence: per sample, that of its answer, in [0, 1].
    """

    looks: list[int] = dataclasses.field(default_factory=list)
    confidence: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Look:
    """One answer of some rows.

    Attributes:
        rows: Their numbers in the batch.
        sure: Per row whether this answer stands.
        output: What `generate` gave; its cache is dropped once other rows have other ones.
        lengths: Per row, how many tokens it wrote.
        confidence: Per row, that of its answer.
        last: What the call kept.
    """

    rows: list[int]
    sure: list[bool]
    output: Any
    lengths: list[int]
    confidence: list[float]
    last: LastCall

    def drop_cache(self) -> None:
        """Give the memory of the KV cache back."""
        for name in CACHE_NAMES:
            if name in self.output:
                self.output[name] = None


def standing(looks: Sequence[Look]) -> list[tuple[int, int]]:
    """Per row of the batch the number of the look that it ends with, and its place in that look."""
    found = {
        row: (number, place)
        for number, look in enumerate(looks)
        for place, (row, sure) in enumerate(zip(look.rows, look.sure, strict=True))
        if sure
    }
    return [found[row] for row in sorted(found)]


def join(looks: Sequence[Look], prompt: int, pad: int | None) -> Any:
    """The output of all rows; that of a single look as it is.

    Tokens behind an answer are padding; scores and logits there are 0. There is no KV cache if rows differ in theirs.

    Args:
        looks: The looks, the last of which is sure of all its rows.
        prompt: Length of the prompt.
        pad: Id of the padding token.
    """
    places = standing(looks)
    ends = {number for number, _ in places}
    first = looks[places[0][0]]
    if len(ends) == 1 and len(first.rows) == len(places):
        return first.output
    longest = max(looks[number].lengths[place] for number, place in places)
    rows = []
    for number, place in places:
        look = looks[number]
        rows.append(_fit(look.output.sequences[place], prompt + look.lengths[place], prompt + longest, pad or 0))
    whole = torch.stack(rows)
    output = first.output
    for name in CACHE_NAMES:
        if name in output:
            output[name] = None
    output.sequences = whole
    for name in ("scores", "logits"):
        if output.get(name) is not None:
            output[name] = tuple(_step(looks, places, name, step) for step in range(longest))
    return output


def _fit(row: Tensor, own: int, length: int, pad: int) -> Tensor:
    """A row cut to its own tokens, then padded to a length."""
    return torch.nn.functional.pad(row[:own], (0, length - min(own, len(row))), value=pad)


def _step(looks: Sequence[Look], places: Sequence[tuple[int, int]], name: str, step: int) -> Tensor:
    """[B, V] the scores of one step."""
    rows = []
    for number, place in places:
        steps = looks[number].output[name]
        inside = step < looks[number].lengths[place]
        rows.append(steps[step][place] if inside else torch.zeros_like(steps[0][place]))
    return torch.stack(rows)


def join_last(looks: Sequence[Look], prompt: int) -> LastLook:
    """What the calls kept, row by row; scores [B, tokens] if each row has one group, 0 where a look asked for none."""
    places = standing(looks)
    lasts = [(looks[number].last, place) for number, place in places]
    scores = [_scores(last, place) for last, place in lasts]
    known = any(one is not None and len(one) for one in scores) and all(one is not None for one in scores)
    return LastLook(
        kept=[last.kept[place] for last, place in lasts],
        total=[last.total[place] for last, place in lasts],
        held=torch.stack([last.held[place, :prompt] for last, place in lasts]),
        candidates=[last.candidates[place] for last, place in lasts],
        scores=torch.nn.utils.rnn.pad_sequence([s for s in scores if s is not None], True) if known else None,
        milliseconds=sum(look.last.milliseconds for look in looks),
        looks=[number + 1 for number, _ in places],
        confidence=[looks[number].confidence[place] for number, place in places],
    )


def _scores(last: LastCall, row: int) -> Tensor | None:
    """[tokens] the scores of a row, none if it was not asked for; None if a row has several groups of them."""
    if last.scores is None or not last.total[row]:
        return last.held.new_zeros(0, dtype=torch.float32)
    if len(last.scores) != sum(total > 0 for total in last.total):
        return None
    return last.scores[sum(total > 0 for total in last.total[:row])]
