"""How many tokens each group of a call keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..config import check_keep_ratio, check_num_tokens, check_one_budget, check_quality
from ..errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Budget:
    """One budget for all samples, or one per sample.

    Attributes:
        keep_ratio: a ratio in (0, 1], or a tuple with one per sample.
        num_tokens: a count >= 1, or a tuple with one per sample.
        everything: True keeps all tokens, whatever the others say.
        tower_keep_ratio: share of the vision tower's rows that stay (see `tower.rows`); None for all.
        quality: in their place, the share of answers that are to be as with all tokens: `generate` turns it into
            budgets (see `grip_hf.quality`).
        rule: for a quality, what an answer is judged by, or None.
    """

    keep_ratio: float | tuple[float, ...] | None = None
    num_tokens: int | tuple[int, ...] | None = None
    everything: bool = False
    tower_keep_ratio: float | str | None = None
    quality: float | None = None
    rule: str | None = None

    @classmethod
    def checked(
        cls, keep_ratio: Any = None, num_tokens: Any = None, quality: Any = None, rule: str | None = None
    ) -> Budget:
        """Validate a budget given by a user; raise `ConfigError` if it is not allowed."""
        check_one_budget(keep_ratio, num_tokens, quality)
        if quality is not None:
            return cls(quality=check_quality(quality), rule=rule)
        if rule is not None:
            raise ConfigError(f"rule={rule!r} goes with quality, not with another budget")
        if keep_ratio is not None:
            return cls(keep_ratio=_each(keep_ratio, check_keep_ratio, "keep_ratio"))
        return cls(num_tokens=_each(num_tokens, check_num_tokens, "num_tokens"))

    @property
    def most(self) -> int | None:
        """The largest number of tokens wanted, if the budget is a number."""
        return max(self.num_tokens) if isinstance(self.num_tokens, tuple) else self.num_tokens


def _each(value: Any, check: Any, name: str) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not value:
            raise ConfigError(f"{name} must have one value per sample, got {value!r}")
        return tuple(check(one) for one in value)
    return check(value)
