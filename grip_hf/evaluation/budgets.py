"""Budgets as people write them: a ratio such as 0.25, or a number of visual tokens such as 64."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from ..config import check_keep_ratio, check_num_tokens, count_kept
from ..errors import ConfigError

Budget = float | int


def check_budget(value: Any) -> Budget:
    """A keep ratio in (0, 1] as a float, or a number of tokens > 1 as an int; raises `ConfigError` for others."""
    if isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 1:
        return check_num_tokens(value)
    return check_keep_ratio(value)


def parse_budget(text: str) -> Budget:
    """The budget that a person writes: a ratio as `0.25` or `25%`, a number of visual tokens as `64`.

    Raises:
        ConfigError: It is none.
    """
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        return check_budget(int(text) if text.isdigit() else number)
    except ValueError as error:  # a ConfigError is one
        reason = f": {error}" if isinstance(error, ConfigError) else ""
        raise ConfigError(f"a budget is a ratio such as 0.25, or a number of tokens, got {text!r}{reason}") from None


def as_setting(budget: Budget) -> dict[str, Any]:
    """The budget as an argument of `model.grip.budget`."""
    return {"num_tokens": budget} if isinstance(budget, int) else {"keep_ratio": budget}


def kept_of(total: int, budget: Budget) -> int:
    """Number of tokens that are kept of `total`."""
    return count_kept(total, **as_setting(budget))


def label(budget: Budget) -> str:
    """The budget for the head of a table."""
    return f"{budget} tokens" if isinstance(budget, int) else f"{budget:.0%}"
