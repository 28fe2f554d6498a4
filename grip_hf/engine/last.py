"""What the last call of a patched model kept."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .call import Step
    from .choice import Choice


@dataclasses.dataclass(frozen=True)
class LastCall:
    """What the last call with pictures, or on a cache that lacks some of theirs, kept.

    Attributes:
        kept: per sample, the indices of the visual tokens that stayed among those of the call, rising. A selector that
            drops tokens between layers lets all of them in.
        total: per sample, the number of visual tokens in the call.
        candidates: per sample, how many of them could stay: those whose rows the vision tower did not drop.
        held: [B, L] bool, the positions that are neither padding nor dropped. At a dropped position the hidden states
            are those of the kept one before it, so leave it out of means over them.
        scores: [groups, tokens] float32 of the selector, 0 at padding; None if it was not asked.
        milliseconds: what asking it took (on a GPU: until the work was queued), 0 if it was not asked.
    """

    kept: list[Tensor]
    total: list[int]
    candidates: list[int]
    held: Tensor
    scores: Tensor | None
    milliseconds: float

    @classmethod
    def of(cls, step: Step, choice: Choice | None) -> LastCall:
        """What a step keeps, and what the selector said."""
        visual, held = step.call.visual, step.keep & step.call.real
        total = visual.sum(1).tolist()
        return cls(
            kept=[stays[seen].nonzero().flatten() for stays, seen in zip(held & visual, visual, strict=True)],
            total=total,
            candidates=total if choice is None else choice.groups.per_row(len(visual)),
            held=held,
            scores=None if choice is None else choice.scores,
            milliseconds=0.0 if choice is None else choice.milliseconds,
        )
