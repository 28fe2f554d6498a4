"""Time stamps inside one call of a multimodal model, on the host and on the GPU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..engine.keepsets import VisualBatch
from ..errors import ConfigError
from ..families.table import find_parts
from ..tower.facts import find_module

# The parts of a call between two marks: name -> (from, to).
SPANS = {
    "vision": ("start", "lm_in"),
    "prune": ("lm_in", "lm_begin"),
    "prefill": ("lm_begin", "lm_done"),
    "restore": ("lm_done", "lm_left"),
    "head": ("lm_left", "end"),
    "total": ("start", "end"),
}
# Parts of `vision`.
WITHIN = {"tower": ("tower_in", "tower_out"), "tower_selector": ("tower_selector_in", "tower_selector_out")}
HOOKED = (("base_in", "base_begin"), ("lm_in", "lm_begin"), ("lm_done", "lm_left"), ("base_done", "base_left"))


def check_clock(cpu_time: bool, device: torch.device) -> None:
    """Raise `ConfigError` if CPU time is asked for where something else than the CPU works."""
    if cpu_time and device.type != "cpu":
        raise ConfigError(f"cpu_time=True counts nothing of what runs on {device.type!r}; leave it out")


class Stopwatch:
    """Marks points in time; on a GPU also in its own stream.

    Args:
        device: Where the model runs.
        cpu_time: Whether the time that this process was given by the CPU counts, which says little of a wait but does
            not grow where other programs share the machine. On several threads it is their sum.
    """

    def __init__(self, device: torch.device, cpu_time: bool = False) -> None:
        self.device, self.clock = device, time.process_time if cpu_time else time.perf_counter
        self.host: dict[str, float] = {}
        self.events: dict[str, torch.cuda.Event] = {}

    def mark(self, name: str) -> None:
        """Remember that `name` is reached."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.events[name] = event
        self.host[name] = self.clock()

    def reset(self) -> None:
        """Forget all marks, after everything asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.host.clear()
        self.events.clear()

    def ms(self, first: str, last: str) -> float:
        """Milliseconds from one mark to another; 0 if the first was not reached."""
        if first not in self.host:
            return 0.0
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return self.events[first].elapsed_time(self.events[last])
        return 1e3 * (self.host[last] - self.host[first])

    def spans(self) -> dict[str, float]:
        """Milliseconds of every part of the call; `prune` is without the `selector`, `tower` without its own."""
        found = {name: self.ms(*marks) for name, marks in {**SPANS, **WITHIN}.items()}
        found["selector"] = self.ms("selector_in", "selector_out")
        found["prune"] -= found["selector"]
        found["tower"] -= found["tower_selector"]
        return found

    def hook_us(self) -> float:
        """Host microseconds spent around the modules, in hooks that are not these."""
        return 1e6 * sum(self.host[last] - self.host[first] for first, last in HOOKED)


class TimedSelector:
    """A selector that marks when it is asked and when it has answered.

    Args:
        selector: It.
        watch: Gets the marks.
        name: What they are called after.
    """

    def __init__(self, selector: Any, watch: Stopwatch, name: str = "selector") -> None:
        self.selector, self.watch, self.name_of_marks = selector, watch, name

    def prepare(self, model: Any) -> list[Any]:
        """Prepare the selector inside."""
        return self.selector.prepare(model)

    def __getattr__(self, name: str) -> Any:
        """What else the selector inside has, such as `merge`."""
        return getattr(self.selector, name)

    def __call__(self, batch: VisualBatch) -> Tensor:
        """Scores of the selector inside."""
        self.watch.mark(f"{self.name_of_marks}_in")
        scores = self.selector(batch)
        self.watch.mark(f"{self.name_of_marks}_out")
        return scores


@contextlib.contextmanager
def watched(model: Any, watch: Stopwatch, inputs: list[dict[str, Any]] | None = None) -> Iterator[None]:
    """Mark the borders of the base model, its tower and its language model, outside and inside of all hooks there are.

    Args:
        model: A model, patched before if at all.
        watch: Gets the marks of the last call.
        inputs: If given, the keyword arguments with which the language model is really called are added to it.
    """
    parts = find_parts(model)
    handles = []

    def before(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: watch.mark(name)

    def after(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs, output: watch.mark(name)

    for module, short in ((parts.base, "base"), (parts.language_model, "lm")):
        handles += [
            module.register_forward_pre_hook(before(f"{short}_in"), prepend=True, with_kwargs=True),
            module.register_forward_pre_hook(before(f"{short}_begin"), with_kwargs=True),
            module.register_forward_hook(after(f"{short}_done"), prepend=True, with_kwargs=True),
            module.register_forward_hook(after(f"{short}_left"), with_kwargs=True),
        ]
    tower = find_module(parts)
    if tower is not None:
        handles += [
            tower.register_forward_pre_hook(before("tower_in"), prepend=True, with_kwargs=True),
            tower.register_forward_hook(after("tower_out"), with_kwargs=True),
        ]
    if inputs is not None:
        spy = lambda module, args, kwargs: inputs.append(dict(kwargs))  # noqa: E731
        handles.append(parts.language_model.register_forward_pre_hook(spy, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
