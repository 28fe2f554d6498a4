"""One call of the language model, on its way through the engine: read, chosen for, planned, rewritten, grown back.

Data alone, each made once: what does something with it stands in the file of that step.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from .cache import CacheState
from .masks import KeyMap
from .plan import Plan


@dataclasses.dataclass(frozen=True)
class Call:
    """The call before pruning.

    Attributes:
        arguments: What the language model is called with, by name.
        config: Its config.
        visual: [B, L] bool, which tokens are visual.
        real: [B, L] bool, which are not padding.
        cache: The KV cache that was given, if any.
        state: What earlier pruned calls left on the cache, if any.
        past: Physical number of cached keys before the call.
        past_logical: Logical number of positions before the call.
        compact: True if positions are re-numbered.
        embeds: [B, L, D] what enters the language model.
        mask: What it was given as attention mask: None, [B, keys], [B, heads, L, keys], or such by kind of layer.
        positions: Position ids as given, last dims [B or 1, L]; None if they are counted.
        segments: [B, L] long, which of the sequences packed into a row each token belongs to; None if there is one.
    """

    arguments: dict[str, Any]
    config: Any
    visual: Tensor
    real: Tensor
    cache: Any
    state: CacheState | None
    past: int
    past_logical: int
    compact: bool
    embeds: Tensor
    mask: Any
    positions: Tensor | None
    segments: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Step:
    """What becomes of it.

    Attributes:
        call: The call.
        keep: [B, L] bool, which positions stay.
        plan: The same, as slots.
        keys: All physical keys in logical terms, cached and new.
        kept: Physical length of the call.
        changes_nothing: Whether every token of the call stays and every key before it is there.
    """

    call: Call
    keep: Tensor
    plan: Plan
    keys: KeyMap
    kept: int
    changes_nothing: bool


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
