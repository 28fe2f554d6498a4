"""HiPrune: objects from a middle layer of the vision tower, the rest from its last."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..engine.keepsets import VisualBatch
from ..errors import ConfigError
from . import register
from .base import Selector
from .taps import Layer, tap_name, tap_vision

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel


@register("hiprune")
class HiPruneSelector(Selector):
    """HiPrune (Liu et al., 2025, arXiv 2508.00553): anchors, their buffers, and registers.

    A share `alpha` of the budget goes to anchors, the tokens most attended to in a middle layer, and to the four
    neighbours of each (buffers); the rest to the tokens most attended to in the layer that feeds the language model.
    Neighbours are those on the picture's grid: one at the border has fewer.

    Args:
        alpha: Share of anchors and buffers, in [0, 1].
        layer: The middle layer, by its index or by its depth as a share of all; in CLIP the paper takes 9 of 24.
    """

    def __init__(self, alpha: float = 0.1, layer: Layer = 9 / 24) -> None:
        if isinstance(alpha, bool) or not 0 <= alpha <= 1:
            raise ConfigError(f"alpha must be a number in [0, 1], got {alpha!r}")
        self.alpha, self.layer = alpha, layer
        self.needs = (tap_name("attention", layer), tap_name("attention", None))

    def prepare(self, model: PreTrainedModel) -> list[RemovableHandle]:
        """Tap both layers; raises `UnsupportedModelError` if the tower has no such layers."""
        handles = tap_vision(model, self.name, ["attention"], self.layer)
        return handles + tap_vision(model, self.name, ["attention"])

    def __call__(self, batch: VisualBatch) -> Tensor:
        """Return scores [G, N]: anchors above buffers above the others."""
        objects, deep = (batch.taps[name].masked_fill(~batch.mask, -1) for name in self.needs)
        number = ((batch.budgets * self.alpha) / 5).round().long()
        rank = objects.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        anchors = (rank < number[:, None]) & batch.mask
        buffers = (neighbours(batch.positions, batch.image_index, batch.mask) & anchors[:, None]).any(-1)
        return deep + 4.0 * anchors + 2.0 * (buffers & ~anchors)


def neighbours(positions: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """[G, N, N] bool: which tokens lie next to each other in a row or a column of the same image."""
    pairs = mask[:, :, None] & mask[:, None] & (image[:, :, None] == image[:, None])
    steps = []
    for axis in (0, 1):
        gap = (positions[:, :, None, axis] - positions[:, None, :, axis]).abs()
        unit = gap.masked_fill(~pairs | (gap < 1e-4), torch.inf).amin((1, 2), keepdim=True) if gap.numel() else gap
        steps.append((gap / unit).nan_to_num(0, 0, 0).round())
    return pairs & (steps[0] + steps[1] == 1)
