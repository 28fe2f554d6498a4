"""How many tokens each group of a call keeps: the config's budget, or one set for a block of code."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from ..config import (
    AUTO,
    check_keep_ratio,
    check_num_tokens,
    check_one_budget,
    check_tower,
    check_tower_ratio,
    count_kept,
    tower_ratio_for,
)
from ..errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Budget:
    """One budget for all samples, or one per sample.

    Attributes:
        keep_ratio: a ratio in (0, 1], or a tuple with one per sample.
        num_tokens: a count >= 1, or a tuple with one per sample.
        everything: True keeps all tokens, whatever the others say.
        tower_keep_ratio: share of the vision tower's rows that stay, in (0, 1]; "auto" for what goes with the other
            budget; None for all.
    """

    keep_ratio: float | tuple[float, ...] | None = None
    num_tokens: int | tuple[int, ...] | None = None
    everything: bool = False
    tower_keep_ratio: float | str | None = None

    @classmethod
    def checked(cls, keep_ratio: Any = None, num_tokens: Any = None, tower_keep_ratio: Any = None) -> Budget:
        """Validate a budget given by a user; raise `ConfigError` if it is not allowed."""
        check_one_budget(keep_ratio, num_tokens)
        tower_keep_ratio = check_tower(tower_keep_ratio)
        if keep_ratio is None:
            return cls(None, _each(num_tokens, check_num_tokens, "num_tokens"), tower_keep_ratio=tower_keep_ratio)
        ratio = _each(keep_ratio, check_keep_ratio, "keep_ratio")
        check_tower_ratio(tower_keep_ratio, max(ratio) if isinstance(ratio, tuple) else ratio)
        return cls(ratio, tower_keep_ratio=tower_keep_ratio)

    @property
    def drops_rows(self) -> bool:
        """Whether rows leave the vision tower, if a picture has enough of them."""
        ratio = max(self.keep_ratio) if isinstance(self.keep_ratio, tuple) else self.keep_ratio
        return self._share(ratio or 0.0) < 1

    def _share(self, needed: float) -> float:
        """Share of the tower's rows that stay: what was asked for, and `needed` by the language model at least."""
        if self.everything or self.tower_keep_ratio is None:
            return 1.0
        share = tower_ratio_for(needed) if self.tower_keep_ratio == AUTO else self.tower_keep_ratio
        return max(float(share), needed)

    def rows(self, totals: list[int], shared: bool) -> list[int]:
        """Groups of rows to keep in the vision tower, as many at least as the language model's budget may ask for.

        Args:
            totals: Groups of each picture.
            shared: Whether all of them belong to one sample, whose budget they share.
        """
        ratio, most = max(self.keep_ratio) if isinstance(self.keep_ratio, tuple) else self.keep_ratio, self.most
        found = []
        for total in totals:
            needed = ratio
            if most is not None:
                needed = min(1.0, most / max(sum(totals) if shared else total, 1))
            # Rounded up, so that what several pictures keep together is never less than their sample's budget.
            found.append(min(total, math.ceil(self._share(needed or 0.0) * total - 1e-9)))
        return found

    def counts(self, totals: list[int], rows: list[int], batch: int, repeated: Callable[[int], bool]) -> list[int]:
        """Tokens to keep per group.

        Args:
            totals: Visual tokens of each group.
            rows: The row of each group in the batch.
            batch: Number of rows.
            repeated: Whether each sample of the batch stands so many times in a row, as `generate` repeats them for
                beams; these keep the per-sample budgets of the original samples.

        Raises:
            ConfigError: Budgets per sample are not as many as the samples.
        """
        if self.everything:
            return totals
        ratios = self._per_row(self.keep_ratio, "keep_ratio", batch, repeated)
        numbers = self._per_row(self.num_tokens, "num_tokens", batch, repeated)
        return [count_kept(total, ratios[row], numbers[row]) for total, row in zip(totals, rows, strict=True)]

    def _per_row(self, value: Any, name: str, batch: int, repeated: Callable[[int], bool]) -> list[Any]:
        if not isinstance(value, tuple):
            return [value] * batch
        repeats = batch // len(value)
        if batch % len(value) or (repeats > 1 and not repeated(repeats)):
            raise ConfigError(f"{name} has {len(value)} values for a batch of {batch} samples; give one per sample")
        return [one for one in value for _ in range(repeats)]

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


# (owner, thread) of each open block, so that a thread that was started inside one can be told that it is not in it.
_open_blocks: list[tuple[object, int]] = []
# A stack of (owner, budget), so that several models may be overridden at once. A context variable is private to each
# thread and to each asyncio task, which makes budgets per call thread-safe.
_stack: ContextVar[tuple[tuple[object, Budget], ...]] = ContextVar("grip_budgets", default=())


@contextlib.contextmanager
def override(owner: object, budget: Budget) -> Iterator[None]:
    """Use `budget` for the model that `owner` belongs to within this block, in this thread."""
    token = _stack.set((*_stack.get(), (owner, budget)))
    block = (owner, threading.get_ident())
    _open_blocks.append(block)
    try:
        yield
    finally:
        _open_blocks.remove(block)
        _stack.reset(token)


def current(owner: object) -> Budget | None:
    """The innermost budget set for `owner` in this thread, if any."""
    return next((budget for key, budget in reversed(_stack.get()) if key is owner), None)


def open_elsewhere(owner: object) -> bool:
    """Whether a block is open for `owner` in another thread, which this one may have been started from."""
    here = threading.get_ident()
    return any(key is owner and thread != here for key, thread in tuple(_open_blocks))
