"""What one thread knows of the calls of patched models that run in it, and what was said of them: budgets and prompts.

Contexts nest: `generate` opens one that knows the prompt, the model around the base model one that knows the labels,
and the base model one that knows what comes in. The language model's hooks look at the innermost one, whichever copy
of a module runs, so that a module that was copied, wrapped or moved finds its call without an id of its own. Budgets
and prompts hold for the `with` block that says them, in its thread and asyncio task alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import check_keep_ratio, check_num_tokens, check_one_budget
from ..errors import ConfigError
from .taps import Encoding

if TYPE_CHECKING:
    from .call import Call, LastCall, Step
    from .hooks import Boundary
    from .layers import LayerDrops


class Hook:
    """Base class of every hook on a module, so that `remove_grip` finds those that copies of modules carried along."""


def forget_hook(module: Any, number: int) -> None:
    """Take a hook that a copy of a module carried along off it; its handle knows the original only."""
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        for kept in (name, f"{name}_with_kwargs", f"{name}_always_called"):
            getattr(module, kept, {}).pop(number, None)


@dataclasses.dataclass(eq=False)
class CallContext:
    """One call, from its first hook to its last.

    Attributes:
        boundary: The patch of the model that is called.
        labels: [B, L] long, given to the model around the base model.
        arguments: Those of the base model, by name; None until it is called.
        taps: What the hooks in the vision tower published of pictures that were encoded within the call.
        call: The language model's call before pruning, once it is known.
        step: What stays of it, if anything goes.
        layers: What is dropped between layers, if the selector does so.
        gradients: Whether gradients are on, as they are not where the selector is asked.
        by_base: Whether the base model was called without the model around it.
        router_mask: [B, past + L] the mask that a loss of the experts' router counts by, if there is one.
    """

    boundary: Boundary
    labels: Tensor | None = None
    arguments: dict[str, Any] | None = None
    taps: Encoding = dataclasses.field(default_factory=Encoding)
    call: Call | None = None
    step: Step | None = None
    layers: LayerDrops | None = None
    gradients: bool = False
    by_base: bool = False
    router_mask: Tensor | None = None


class _Thread(threading.local):
    def __init__(self) -> None:
        self.contexts: list[CallContext] = []
        self.last: weakref.WeakKeyDictionary[Boundary, LastCall] = weakref.WeakKeyDictionary()


_thread = _Thread()


def innermost() -> CallContext | None:
    """The context of the call that runs, or None outside any."""
    return _thread.contexts[-1] if _thread.contexts else None


def running() -> CallContext | None:
    """The context of the base model's call that runs, or None in a decoding step and outside any."""
    context = innermost()
    return context if context is not None and context.arguments is not None else None


def interrupted() -> bool:
    """Whether a call that is not `generate` is open: the one that runs, or one that never ended."""
    # Not `bool` of the list, which torch 2.11 cannot compile.
    return len(_thread.contexts) > 0 and type(_thread.contexts[-1]) is CallContext


def push(context: CallContext) -> None:
    """Enter a call. What an interrupted call of the same model left behind goes first."""
    forget(context.boundary)
    _thread.contexts.append(context)


def forget(boundary: Boundary) -> None:
    """Leave a model's call, within the `generate` that it may be part of, and whatever was entered since."""
    stack = _thread.contexts
    first = len(stack)
    while first and not isinstance(stack[first - 1], Generation):
        first -= 1
    for place in range(first, len(stack)):
        if stack[place].boundary is boundary:
            del stack[place:]
            return


@dataclasses.dataclass(eq=False)
class Generation(CallContext):
    """The context that `generate` opens; the calls in it come and go.

    Attributes:
        prompt_ids: [B, P] long, what it was given.
    """

    prompt_ids: Tensor | None = None


def forget_all() -> None:
    """Leave all calls of this thread, of whichever model."""
    _thread.contexts.clear()


@contextlib.contextmanager
def generation(boundary: Boundary, prompt_ids: Tensor | None) -> Iterator[None]:
    """Within the block, calls of a model belong to one `generate` with this prompt."""
    before = list(_thread.contexts)
    _thread.contexts.append(Generation(boundary, prompt_ids=prompt_ids))
    try:
        yield
    finally:
        _thread.contexts[:] = before  # also after an interrupt in the middle of a call


def prompt_of_generation(boundary: Boundary) -> Tensor | None:
    """What the `generate` around this call was given, if one of this model is."""
    around = (one for one in reversed(_thread.contexts) if isinstance(one, Generation) and one.boundary is boundary)
    return next((one.prompt_ids for one in around), None)


def remember_last(boundary: Boundary, last: LastCall) -> None:
    """Remember what the last call of a model kept, in this thread."""
    _thread.last[boundary] = last


def last_of(boundary: Boundary) -> LastCall | None:
    """What the last call of a model kept, in this thread."""
    return _thread.last.get(boundary)


@dataclasses.dataclass(frozen=True)
class Budget:
    """One budget for all samples, or one per sample.

    Attributes:
        keep_ratio: a ratio in (0, 1], or a tuple with one per sample.
        num_tokens: a count >= 1, or a tuple with one per sample.
        everything: True keeps all tokens, whatever the other two say.
    """

    keep_ratio: float | tuple[float, ...] | None = None
    num_tokens: int | tuple[int, ...] | None = None
    everything: bool = False

    @classmethod
    def checked(cls, keep_ratio: Any = None, num_tokens: Any = None) -> Budget:
        """Validate a budget given by a user; raise `ConfigError` if it is not allowed."""
        check_one_budget(keep_ratio, num_tokens)
        if keep_ratio is not None:
            return cls(keep_ratio=_each(keep_ratio, check_keep_ratio, "keep_ratio"))
        return cls(num_tokens=_each(num_tokens, check_num_tokens, "num_tokens"))

    def counts(self, totals: Tensor, rows: Tensor, batch: int, repeated: Callable[[int], bool]) -> Tensor:
        """[G] long: tokens to keep per group, each as `config.count_kept` counts them.

        Args:
            totals: [G] long, visual tokens of each group, at least 1.
            rows: [G] long, the row of each group in the batch.
            batch: Number of rows.
            repeated: Whether each sample of the batch stands so many times in a row, as `generate` repeats them for
                beams; these keep the per-sample budgets of the original samples.

        Raises:
            ConfigError: Budgets per sample are not as many as the samples.
        """
        if self.everything:
            return totals
        if self.num_tokens is not None:
            numbers = torch.tensor(self._per_row(self.num_tokens, "num_tokens", batch, repeated))
            return numbers.to(rows.device)[rows].minimum(totals)
        # On the CPU, in double precision, which some devices lack.
        ratios = torch.tensor(self._per_row(self.keep_ratio, "keep_ratio", batch, repeated), dtype=torch.float64)
        counts = (ratios[rows.cpu()] * totals.cpu() + 0.5).floor().long().clamp(min=1)
        return counts.to(totals.device).minimum(totals)

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


def budget_of(boundary: Boundary) -> Budget:
    """The budget of the call at hand: what was said of the model, or of the one that it follows, or the usual one."""
    said = current(boundary.key)
    if said is None and boundary.leader is not None:
        return budget_of(boundary.leader)
    if said is None and open_elsewhere(boundary.key):
        boundary.warn_once(
            "a budget(...) or disabled() block is open in another thread and does not hold in this one. A thread "
            "that was started inside the block takes it along by its context: "
            "Thread(target=contextvars.copy_context().run, args=(model.generate,), kwargs=inputs)"
        )
    return said or boundary.usual


# A stack of (owner, prompt), so that several models may be told at once; private to each thread and task.
_told: ContextVar[tuple[tuple[object, Tensor | Sequence[int]], ...]] = ContextVar("grip_prompts", default=())


@contextlib.contextmanager
def told(owner: object, prompt: Tensor | Sequence[int]) -> Iterator[None]:
    """Within the block, calls of the model that `owner` belongs to have this prompt (see `GripHandle.prompt`)."""
    if not isinstance(prompt, Tensor):
        lengths = list(prompt) if isinstance(prompt, Sequence) and not isinstance(prompt, str) else []
        if not lengths or not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in lengths):
            raise ConfigError(f"prompt must be a mask [B, L] or a list of lengths >= 0, got {prompt!r}")
    elif prompt.ndim != 2 or prompt.is_floating_point():
        raise ConfigError(
            f"prompt must be a mask [B, L] of bools or integers, got {prompt.dtype} {tuple(prompt.shape)}"
        )
    token = _told.set((*_told.get(), (owner, prompt)))
    try:
        yield
    finally:
        _told.reset(token)


def told_prompt(boundary: Boundary) -> Tensor | Sequence[int] | None:
    """What was said of the prompt of a model's calls, or of those of the model that it follows, if anything was."""
    mine = [one.key for one in (boundary, boundary.leader) if one is not None]
    return next((prompt for key, prompt in reversed(_told.get()) if any(key is own for own in mine)), None)
