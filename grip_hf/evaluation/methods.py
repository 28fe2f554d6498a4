"""What is judged: ways to answer a batch of prompts with fewer visual tokens, each through `generate` itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..config import count_kept
from ..engine.keepsets import VisualBatch
from ..errors import ConfigError
from ..frozen.samples import Sample
from ..frozen.vlm import FrozenVLM, pictures
from ..patch import apply_grip, remove_grip
from .downsampling import check_square, downsample

Scores = Callable[[VisualBatch], Tensor]


class Prompts:
    """A batch of prompts with encoded pictures, to be asked again and again.

    Args:
        vlm: Who is asked.
        samples: What.
    """

    def __init__(self, vlm: FrozenVLM, samples: Sequence[Sample]) -> None:
        self.vlm, self.samples = vlm, samples
        self.inputs: dict[str, Any] = vlm.collate([sample.inputs for sample in samples])
        self.pictures = pictures([sample.encoded for sample in samples])

    @cached_property
    def pixels(self) -> list[Tensor]:
        """Per sample the pixels of its pictures [pictures, ...]."""
        return [self.vlm.process(sample.example)["pixel_values"] for sample in self.samples]

    def said(self, inputs: dict[str, Any]) -> Tensor:
        """[B, A] long: what greedy decoding writes from `inputs`, up to the longest answer; -1 behind its end."""
        longest = max(len(sample.answer) for sample in self.samples)
        written = self.vlm.model.generate(**inputs, max_new_tokens=longest, do_sample=False, num_beams=1)
        written = written[:, inputs["input_ids"].shape[1] :]
        return torch.nn.functional.pad(written, (0, longest - written.shape[1]), value=-1)

    def right(self, inputs: dict[str, Any]) -> list[bool]:
        """Per sample whether greedy decoding from `inputs` writes exactly its answer, and ends it there."""
        answers = [sample.answer for sample in self.samples]
        written = self.said(inputs)
        return [torch.equal(row[: len(answer)], answer) for row, answer in zip(written, answers, strict=True)]


@runtime_checkable
class Method(Protocol):
    """A way to use fewer visual tokens."""

    def check(self, model: Any) -> None:
        """Raise `GripError` if the model cannot be used like this; leaves it as it is, without a patch."""
        ...

    def answers(self, prompts: Prompts, ratios: Sequence[float]) -> list[list[bool]]:
        """Per keep ratio and sample whether the answer is right; leaves the model without a patch."""
        ...


class Unpruned:
    """All visual tokens."""

    def check(self, model: Any) -> None:
        """Any model will do."""

    def answers(self, prompts: Prompts, ratios: Sequence[float]) -> list[list[bool]]:
        """The same at every ratio."""
        remove_grip(prompts.vlm.model)
        return [prompts.right({**prompts.inputs, **prompts.pictures})] * len(ratios)


class Pruned:
    """A selector behind `apply_grip`, as a user would have it.

    Args:
        selector: The selector.
    """

    def __init__(self, selector: Scores) -> None:
        self.selector = selector

    def check(self, model: Any) -> None:
        """The selector must be able to work with the model."""
        remove_grip(apply_grip(model, keep_ratio=0.5, selector=self.selector))

    def answers(self, prompts: Prompts, ratios: Sequence[float]) -> list[list[bool]]:
        """Patch once, then ask at each ratio."""
        model: Any = apply_grip(prompts.vlm.model, keep_ratio=0.5, selector=self.selector)
        found = []
        try:
            for ratio in ratios:
                with model.grip.budget(keep_ratio=ratio):
                    found.append(prompts.right({**prompts.inputs, **prompts.pictures}))
        finally:
            remove_grip(model)
        return found


class Oracle:
    """Keeps what the examples themselves say is needed (`columns["evidence"]`): a yardstick, not a method."""

    def check(self, model: Any) -> None:
        """Any model will do."""

    def answers(self, prompts: Prompts, ratios: Sequence[float]) -> list[list[bool]]:
        """Ask with the evidence of these samples."""
        return Pruned(partial(self.scores, samples=prompts.samples)).answers(prompts, ratios)

    def scores(self, batch: VisualBatch, samples: Sequence[Sample]) -> Tensor:
        """[G, N] float32: falling along each example's evidence.

        Raises:
            ConfigError: An example has no evidence, or one beyond its tokens.
        """
        result = torch.zeros_like(batch.mask, dtype=torch.float32)
        for row, sample in zip(result, samples, strict=True):
            order = sample.example.columns.get("evidence")
            if order is None:
                raise ConfigError("the selector 'oracle' needs examples with a column 'evidence'")
            if order and not 0 <= min(order) <= max(order) < sample.num_visual:
                raise ConfigError(f"evidence must name visual tokens 0 to {sample.num_visual - 1}, got {list(order)}")
            row[list(order)] = torch.arange(len(order), 0, -1, dtype=torch.float32, device=row.device)
        return result


class Downsampling:
    """Smaller pictures, of no more visual tokens than the budget allows, for the model without a patch."""

    def check(self, model: Any) -> None:
        """The model must take square pictures of any size."""
        check_square(model)

    def answers(self, prompts: Prompts, ratios: Sequence[float]) -> list[list[bool]]:
        """Shrink, encode and ask at each ratio."""
        remove_grip(prompts.vlm.model)
        model = prompts.vlm.model
        inputs = {**prompts.inputs, "pixel_values": torch.cat(prompts.pixels).to(model.dtype)}
        found = []
        for ratio in ratios:
            counts = [
                count_kept(sample.num_visual, ratio) // len(pixels)
                for sample, pixels in zip(prompts.samples, prompts.pixels, strict=True)
            ]
            small = downsample(model, inputs, max(1, min(counts)))
            found.append(prompts.right(small))
        return found
