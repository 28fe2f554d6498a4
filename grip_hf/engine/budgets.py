"""How many tokens each group of a call keeps: the config's budget, or one set for a block of code."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from ..config import check_keep_ratio, check_num_tokens, check_one_budget, check_quality, count_kept
from ..errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Budget:
    """One budget for all samples, or one per sample.

    Attributes:
        keep_ratio: a ratio in (0, 1], or a tuple with one per sample.
        num_tokens: a count >= 1, or a tuple with one per sample.
        everything: True keeps all tokens, whatever the others say.
        quality: in their place, the share of answers that are to be as with all tokens: `generate` turns it into
            budgets (see `grip_hf.quality`).
        rule: for a quality, when an answer is looked at for doubt, or None.
    """

    keep_ratio: float | tuple[float, ...] | None = None
    num_tokens: int | tuple[int, ...] | None = None
    everything: bool = False
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
def override(owner: object, budget: Budget, told: bool = True) -> Iterator[None]:
    """Use `budget` for the model that `owner` belongs to within this block, in this thread.

    Args:
        owner: Whose.
        budget: It.
        told: Whether other threads are told that it does not hold in them; not if nobody but this library asked.
    """
    token = _stack.set((*_stack.get(), (owner, budget)))
    blocks = [(owner, threading.get_ident())] if told else []
    _open_blocks.extend(blocks)
    try:
        yield
    finally:
        for block in blocks:
            _open_blocks.remove(block)
        _stack.reset(token)


def current(owner: object) -> Budget | None:
    """The innermost budget set for `owner` in this thread, if any."""
    return next((budget for key, budget in reversed(_stack.get()) if key is owner), None)


def open_elsewhere(owner: object) -> bool:
    """Whether a block is open for `owner` in another thread, which this one may have been started from."""
    here = threading.get_ident()
    return any(key is owner and thread != here for key, thread in tuple(_open_blocks))
