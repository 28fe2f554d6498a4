"""Fewer visual tokens without choosing any: smaller pictures and pooled features, and what a smaller picture holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..patch import remove_grip
from .budgets import Budget, kept_of
from .downsampling import check_square, downsample, enlarge, pool
from .methods import Answer, Prompts

Shrink = Callable[[Any, dict[str, Any], int], dict[str, Any]]


class Shrunk:
    """Pictures of no more visual tokens than the budget allows, for the model without a patch.

    Args:
        shrink: Makes inputs of the model from its inputs and a number of tokens.
    """

    def __init__(self, shrink: Shrink = downsample) -> None:
        self.shrink = shrink

    def check(self, model: Any) -> None:
        """The model must take square pictures of any size."""
        check_square(model)

    def answers(self, prompts: Prompts, budgets: Sequence[Budget]) -> list[list[Answer]]:
        """Shrink, encode and ask at each budget."""
        remove_grip(prompts.vlm.model)
        model = prompts.vlm.model
        inputs = {**prompts.inputs, "pixel_values": torch.cat(prompts.pixels).to(model.dtype)}
        found = []
        for budget in budgets:
            counts = [
                kept_of(sample.num_visual, budget) // len(pixels)
                for sample, pixels in zip(prompts.samples, prompts.pixels, strict=True)
            ]
            found.append(prompts.judged(self.shrink(model, inputs, max(1, min(counts)))))
        return found

    def held(self, total: int, budget: Budget, depth: int) -> list[int]:
        """Visual tokens that each layer sees of a prompt with one picture: the largest square within the budget."""
        return [math.isqrt(kept_of(total, budget)) ** 2] * depth


class Enlarged(Shrunk):
    """The smaller picture, enlarged to its old size, with all tokens: a yardstick, which saves nothing."""

    def __init__(self) -> None:
        super().__init__(enlarge)

    def held(self, total: int, budget: Budget, depth: int) -> list[int]:
        """All."""
        return [total] * depth


class Pooled(Shrunk):
    """Features of the whole picture, averaged over a coarser grid before the projector."""

    def __init__(self) -> None:
        super().__init__(pool)
