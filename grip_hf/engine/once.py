"""Pictures that are encoded once for several calls of `generate` on the same prompts."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from .budget import Budget

Taps = dict[str, Tensor]
Encoded = tuple[Any, Taps]


@dataclasses.dataclass
class Memory:
    """What the methods that encode pictures gave, in the order of their calls.

    Attributes:
        kept: by method, its outputs and their taps.
        given: by method, what it gives back instead of running; None while the pictures are encoded.
        tests: tell of a budget whether the vision tower would keep the rows that it kept; none if it keeps all.
    """

    kept: dict[str, list[Encoded]] = dataclasses.field(default_factory=dict)
    given: dict[str, list[Encoded]] | None = None
    tests: list[Callable[[Budget], bool]] = dataclasses.field(default_factory=list)

    def fits(self, budget: Budget) -> bool:
        """Whether pictures that are encoded under a budget are what was kept."""
        return all(test(budget) for test in self.tests)

    def forget(self) -> None:
        """Let pictures be encoded anew."""
        self.kept, self.given, self.tests = {}, None, []

    def replay(self, change: Callable[[Encoded], Encoded] = lambda one: one) -> None:
        """From now on, give back what was kept, changed like this."""
        self.given = {name: [change(one) for one in calls] for name, calls in self.kept.items()}


_memory: ContextVar[Memory | None] = ContextVar("grip_encoded", default=None)


@contextlib.contextmanager
def remembering() -> Iterator[Memory]:
    """Within the block, in this thread, pictures are encoded once, and then as the memory says."""
    token = _memory.set(Memory())
    memory = _memory.get()
    assert memory is not None
    try:
        yield memory
    finally:
        _memory.reset(token)


def known(name: str) -> Encoded | None:
    """What a method that encodes pictures is to give back; None if it has to run."""
    memory = _memory.get()
    if memory is None or not (memory.given or {}).get(name):
        return None
    return memory.given[name].pop(0)  # type: ignore[index]


def keep(name: str, output: Any, taps: Taps) -> None:
    """Remember what a method has encoded, if anybody wants it again."""
    memory = _memory.get()
    if memory is not None and memory.given is None:
        memory.kept.setdefault(name, []).append((output, taps))


def keep_test(test: Callable[[Budget], bool]) -> None:
    """Remember of pictures that are being encoded under which budgets they would be encoded alike."""
    memory = _memory.get()
    if memory is not None and memory.given is None:
        memory.tests.append(test)
