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
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import ConfigError
from .budget import Budget
from .taps import Encoding

if TYPE_CHECKING:
    from .call import Call, LastCall, Step
    from .drops import LayerDrops
    from .hooks import Boundary


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
        prompt_mask: [B, P], 0 at padding, likewise.
    """

    prompt_ids: Tensor | None = None
    prompt_mask: Tensor | None = None


def forget_all() -> None:
    """Leave all calls of this thread, of whichever model."""
    _thread.contexts.clear()


@contextlib.contextmanager
def generation(boundary: Boundary, prompt_ids: Tensor | None, prompt_mask: Tensor | None = None) -> Iterator[None]:
    """Within the block, calls of a model belong to one `generate` with this prompt."""
    before = list(_thread.contexts)
    _thread.contexts.append(Generation(boundary, prompt_ids=prompt_ids, prompt_mask=prompt_mask))
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


def budget_of(boundary: Boundary) -> Budget:
    """The budget of the call at hand, in tokens.

    Raises:
        ConfigError: It is a quality, which only `generate` can keep.
    """
    budget = asked_of(boundary)
    if budget.quality is not None:
        raise ConfigError(
            f"quality={budget.quality} is promised of the answers of generate: a call of the model itself, as in "
            "training, needs a budget: with model.grip.budget(keep_ratio=...), or model.grip.disabled()"
        )
    return budget


def asked_of(boundary: Boundary) -> Budget:
    """The budget of the call at hand: what was said of the model, or of the one that it follows, or the usual one."""
    said = current(boundary.key)
    if said is None and boundary.leader is not None:
        return asked_of(boundary.leader)
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
