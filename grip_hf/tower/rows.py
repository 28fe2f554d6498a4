"""How many rows of the vision tower stay under a budget. Pure functions.

The tower never drops so many that the language model's budget could not be met.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ..config import AUTO, check_tower, check_tower_ratio, tower_ratio_for
from ..engine.budget import Budget


def checked(
    keep_ratio: Any, num_tokens: Any, tower_keep_ratio: Any, quality: Any = None, rule: str | None = None
) -> Budget:
    """Validate a budget of both kinds given by a user; raise `ConfigError` if it is not allowed."""
    tower = check_tower(tower_keep_ratio)
    budget = Budget.checked(keep_ratio, num_tokens, quality, rule)
    check_tower_ratio(tower, needed(budget) or 0.0)
    return dataclasses.replace(budget, tower_keep_ratio=tower)


def needed(budget: Budget) -> float | None:
    """The largest share of the visual tokens that a budget of ratios keeps; None if it is one of numbers."""
    ratio = budget.keep_ratio
    return max(ratio) if isinstance(ratio, tuple) else ratio


def drops_rows(budget: Budget) -> bool:
    """Whether rows leave the vision tower, if a picture has enough of them."""
    return _share(budget, needed(budget) or 0.0) < 1


def rows_of(budget: Budget, totals: list[int], shared: bool) -> list[int]:
    """Groups of rows to keep, as many at least as the language model's budget may ask for.

    Args:
        budget: The budget.
        totals: Groups of each picture.
        shared: Whether all of them belong to one sample, whose budget they share.
    """
    found = []
    for total in totals:
        share = needed(budget)
        if share is None:
            share = min(1.0, (budget.most or 0) / max(sum(totals) if shared else total, 1))
        # Rounded up, so that what several pictures keep together is never less than their sample's budget.
        found.append(min(total, math.ceil(_share(budget, share) * total - 1e-9)))
    return found


def _share(budget: Budget, least: float) -> float:
    """Share of the rows that stays: what was asked for, and at least that of the language model's budget."""
    asked = budget.tower_keep_ratio
    if budget.everything or asked is None:
        return 1.0
    return max(tower_ratio_for(least) if asked == AUTO else float(asked), least)
