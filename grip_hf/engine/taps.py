"""What hooks in the vision tower publish of pictures while they are encoded, for selectors that need it.

It belongs to the encoded output that it describes, which may come back in another call of the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass
class Encoding:
    """Rows per visual token, by tap, each with what it was computed from; pictures in the order of their encoding."""

    parts: dict[str, list[tuple[Tensor, Tensor]]] = dataclasses.field(default_factory=dict)
    encoder: str = ""  # the method of the base model that encodes them

    def add(self, other: Encoding) -> None:
        """Take over what another encoding collected."""
        for name, parts in other.parts.items():
            self.parts.setdefault(name, []).extend(parts)

    def joined(self) -> dict[str, Tensor]:
        """One tensor [tokens, ...] per tap."""
        return {name: torch.cat([rows for _, rows in parts]) for name, parts in self.parts.items()}


class _Thread(threading.local):
    def __init__(self) -> None:
        self.encodings: list[Encoding] = []


_thread = _Thread()
_taps: dict[int, tuple[weakref.ref[Any], dict[str, Tensor]]] = {}  # id of an encoded output -> (itself, its taps)


@contextlib.contextmanager
def encoding(encoder: str = "") -> Iterator[Encoding]:
    """Collect what is published while pictures are encoded; published elsewhere, as by a recomputation, it is lost."""
    outer = _thread.encodings[-1].encoder if _thread.encodings else ""  # one for videos may call that for pictures
    _thread.encodings.append(Encoding(encoder=outer or encoder))
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


def encoder() -> str:
    """The method of a patched base model that is encoding pictures, or "" outside any."""
    return _thread.encodings[-1].encoder if _thread.encodings else ""


def taken_out(name: str) -> Tensor | None:
    """Take out what was published under a name of the pictures that are being encoded, if anything was."""
    parts = _thread.encodings[-1].parts.pop(name, None) if _thread.encodings else None
    return None if parts is None else torch.cat([rows for _, rows in parts])


def attach_taps(encoded: Any, taps: dict[str, Tensor]) -> None:
    """Let an encoded output carry the taps of its pictures, for as long as it lives."""
    key = id(encoded)
    _taps[key] = weakref.ref(encoded, lambda _: _taps.pop(key, None)), taps


def attached_taps(encoded: Any) -> dict[str, Tensor]:
    """The taps that an encoded output carries."""
    known, taps = _taps.get(id(encoded), (None, {}))
    return taps if known is not None and known() is encoded else {}
