"""The pictures of a batch for looks in a row, encoded as often as a ladder encodes them, and what that takes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from ..engine.context import asked_of
from ..engine.methods import InstanceMethod
from ..engine.once import Memory, remembering
from ..engine.upstream import ENCODERS
from ..evaluation.stopwatch import Stopwatch
from ..frozen.samples import Sample
from ..frozen.vlm import FrozenVLM, pictures


class Looks(contextlib.ExitStack):
    """Looks at a batch, within the block.

    Where all rows stay in the vision tower, its pictures are those that are encoded already. Else `generate` encodes
    them, once for looks in a row at which the same rows stay.

    Args:
        vlm: The model.
        samples: The batch.
        handle: The patch of the model.
        cpu_time: Whether CPU time counts instead of the clock's.

    Attributes:
        pictures: Arguments of `generate`.
        seconds: By look, what it took, without encoding.
        vision: By look, what the encoding took that it used; 0 where that was there already.
        encodings: By look, the number of that encoding.
    """

    def __init__(self, vlm: FrozenVLM, samples: Sequence[Sample], handle: Any, cpu_time: bool = False) -> None:
        super().__init__()
        self.handle, self.watch = handle, Stopwatch(vlm.device, cpu_time)
        self.drops = handle.tower.dropping(asked_of(handle._boundary)) is not None
        self.pictures = vlm.pixels(samples) if self.drops else pictures([one.encoded for one in samples])
        self.seconds: list[float] = []
        self.vision: list[float] = []
        self.encodings: list[int] = []

    def __enter__(self) -> Looks:
        """Remember what is encoded, and watch what encodes."""
        super().__enter__()
        self.memory: Memory = self.enter_context(remembering())
        base = self.handle._boundary.parts.base
        for name in ENCODERS if self.drops else ():
            if hasattr(type(base), name):
                method = Timed(base, name, self.watch)
                method.attach()
                self.callback(method.remove)
        return self

    @contextlib.contextmanager
    def look(self) -> Iterator[None]:
        """Within the block, look at the budget that holds."""
        first = not self.encodings
        anew = first or not self.memory.fits(asked_of(self.handle._boundary))
        if anew:
            self.memory.forget()
        else:
            self.memory.replay()
        self.watch.reset()
        self.watch.mark("start")
        yield
        self.watch.mark("end")
        taken = self.watch.ms("start", "end") / 1000
        vision = self.watch.ms("in", "out") / 1000 if anew else 0.0
        self.seconds.append(taken - vision)
        self.vision.append(vision if anew else self.vision[-1])
        self.encodings.append(0 if first else self.encodings[-1] + anew)


class Timed(InstanceMethod):
    """A method that encodes pictures, which marks when it begins and ends."""

    def __init__(self, module: Any, name: str, watch: Stopwatch) -> None:
        super().__init__(module, name)
        self.watch = watch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Encode."""
        self.watch.mark("in")
        output = self.own(*args, **kwargs)
        self.watch.mark("out")
        return output
