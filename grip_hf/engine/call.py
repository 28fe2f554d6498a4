"""One call of the language model, on its way through the engine: read, chosen for, planned, rewritten, grown back."""

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

    @property
    def embeds(self) -> Tensor:
        """[B, L, D] what enters the language model."""
        embeds: Tensor = self.arguments["inputs_embeds"]
        return embeds

    @property
    def mask(self) -> Any:
        """What it was given as attention mask: None, [B, keys], [B, heads, L, keys], or such by kind of layer."""
        return self.arguments.get("attention_mask")

    @property
    def positions(self) -> Tensor | None:
        """Position ids as given, last dims [B or 1, L]; None if they are counted."""
        return self.arguments.get("position_ids")


@dataclasses.dataclass(frozen=True)
class Step:
    """What becomes of it.

    Attributes:
        call: The call.
        keep: [B, L] bool, which positions stay.
        plan: The same, as slots.
        keys: All physical keys in logical terms, cached and new.
    """

    call: Call
    keep: Tensor
    plan: Plan
    keys: KeyMap

    @property
    def kept(self) -> int:
        """Physical length of the call."""
        return self.plan.index.shape[1]

    @property
    def changes_nothing(self) -> bool:
        """Whether every token of the call stays and every key before it is there."""
        return self.keys.full and self.keys.index.shape[1] == self.call.past_logical + self.plan.length
