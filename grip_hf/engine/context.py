"""What one thread knows of the calls of patched models that run in it. Nothing else is remembered per thread.

Contexts nest: `generate` opens one that knows the prompt, the model around the base model one that knows the labels,
and the base model one that knows what comes in. The language model's hooks look at the innermost one, whichever copy
of a module runs, so that a module that was copied, wrapped or moved finds its call without an id of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .call import Call, Step
    from .hooks import Boundary
    from .last import LastCall
    from .layers import LayerDrops


class Hook:
    """Base class of every hook on a module, so that `remove_grip` finds those that copies of modules carried along."""


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
    taps: Encoding = dataclasses.field(default_factory=lambda: Encoding())
    call: Call | None = None
    step: Step | None = None
    layers: LayerDrops | None = None
    gradients: bool = False
    by_base: bool = False
    router_mask: Tensor | None = None


@dataclasses.dataclass
class Encoding:
    """Rows per visual token, by tap, each with what it was computed from; pictures in the order of their encoding."""

    parts: dict[str, list[tuple[Tensor, Tensor]]] = dataclasses.field(default_factory=dict)

    def add(self, other: Encoding) -> None:
        """Take over what another encoding collected."""
        for name, parts in other.parts.items():
            self.parts.setdefault(name, []).extend(parts)

    def joined(self) -> dict[str, Tensor]:
        """One tensor [tokens, ...] per tap."""
        return {name: torch.cat([rows for _, rows in parts]) for name, parts in self.parts.items()}


class _Thread(threading.local):
    def __init__(self) -> None:
        self.contexts: list[CallContext] = []
        self.encodings: list[Encoding] = []
        self.last: weakref.WeakKeyDictionary[Boundary, LastCall] = weakref.WeakKeyDictionary()


_thread = _Thread()
# Taps belong to the encoded output that they describe, which may come back in another call: id -> (itself, taps).
_taps: dict[int, tuple[weakref.ref[Any], dict[str, Tensor]]] = {}


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


@contextlib.contextmanager
def encoding() -> Iterator[Encoding]:
    """Collect what is published while pictures are encoded; published elsewhere, as by a recomputation, it is lost."""
    _thread.encodings.append(Encoding())
    try:
        yield _thread.encodings[-1]
    finally:
        _thread.encodings.pop()


def publish(name: str, source: Tensor, rows: Callable[[], Tensor]) -> None:
    """Add to the tap `name` of the pictures that are being encoded.

    Args:
        name: The tap.
        source: What it is computed from. Of several hooks that tap the same of one source, the first publishes.
        rows: Gives the rows [tokens, ...]; not asked if nobody collects them.
    """
    if _thread.encodings:
        parts = _thread.encodings[-1].parts.setdefault(name, [])
        if not any(source is one for one, _ in parts):
            parts.append((source, rows()))


def attach_taps(encoded: Any, taps: dict[str, Tensor]) -> None:
    """Let an encoded output carry the taps of its pictures, for as long as it lives."""
    key = id(encoded)
    _taps[key] = weakref.ref(encoded, lambda _: _taps.pop(key, None)), taps


def attached_taps(encoded: Any) -> dict[str, Tensor]:
    """The taps that an encoded output carries."""
    known, taps = _taps.get(id(encoded), (None, {}))
    return taps if known is not None and known() is encoded else {}
