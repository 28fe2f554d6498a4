"""A cache that forgets what was used least recently once it holds too many bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class ByteCache(Generic[V]):
    """Values by key.

    Args:
        limit: Bytes that may be held; the newest value stays even if it alone is larger.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self._values: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> V | None:
        """The value of a key, which counts as a use, or None."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def put(self, key: Hashable, value: V, size: int) -> V:
        """Remember a value of `size` bytes and return it."""
        if key in self._values:
            self.held -= self._values.pop(key)[1]
        self._values[key] = (value, size)
        self.held += size
        while self.held > self.limit and len(self._values) > 1:
            self.held -= self._values.popitem(last=False)[1][1]
        return value
