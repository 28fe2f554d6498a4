"""HiPrune: objects from a middle layer of the vision tower, the rest from its last."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..engine.keepsets import VisualBatch
from ..errors import ConfigError
from ..families.towers import PackedAttended
from . import register
from .base import Selector
from .taps import Layer, find_tower, tap_name, tap_vision

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

CLIP_DEPTH, PACKED_DEPTH = 8 / 24, 15 / 32  # the ninth layer of CLIP, the sixteenth of Qwen2.5-VL's tower


@register("hiprune")
class HiPruneSelector(Selector):
    """HiPrune (Liu et al., 2025, arXiv 2508.00553): anchors, their buffers, and registers.

    A share `alpha` of the budget goes to anchors, the tokens most attended to in a middle layer, and to the four
    neighbours of each (buffers); the rest to the tokens most attended to in the layer that feeds the language model.
    As in the official code, neighbours are one token and one row of tokens before and behind in raster order: the end
    of a row is next to the start of the following one, and what would lie before the picture's first token or behind
    its last is that token.

    Args:
        alpha: Share of anchors and buffers, in [0, 1].
        layer: The middle layer, by its index or by its depth as a share of all; by default the official one, index 8
            of 24 in CLIP and 15 of 32 in Qwen2.5-VL, or as deep in towers of another depth.
    """

    def __init__(self, alpha: float = 0.1, layer: Layer = None) -> None:
        if isinstance(alpha, bool) or not 0 <= alpha <= 1:
            raise ConfigError(f"alpha must be a number in [0, 1], got {alpha!r}")
        self.alpha, self.layer = alpha, layer
        middle = CLIP_DEPTH if layer is None else layer
        self.needs = (tap_name("attention", middle), tap_name("attention", None))

    def prepare(self, model: PreTrainedModel) -> list[RemovableHandle]:
        """Tap both layers; raises `UnsupportedModelError` if the tower has no such layers."""
        middle = self.layer
        if middle is None:
            middle = PACKED_DEPTH if find_tower(model, self.name)[2].attended is PackedAttended else CLIP_DEPTH
            self.needs = (tap_name("attention", middle), tap_name("attention", None))
        handles = tap_vision(model, self.name, ["attention"], middle)
        return handles + tap_vision(model, self.name, ["attention"])

    def __call__(self, batch: VisualBatch) -> Tensor:
        """Return scores [G, N]: anchors above buffers above the others."""
        objects, deep = (batch.taps[name].masked_fill(~batch.mask, -1) for name in self.needs)
        number = ((batch.budgets * self.alpha) / 5).round().long()
        rank = objects.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        anchors = (rank < number[:, None]) & batch.mask
        buffers = beside(anchors, batch.positions, batch.image_index.masked_fill(~batch.mask, -1))
        return deep + 4.0 * anchors + 2.0 * (buffers & ~anchors & batch.mask)


def beside(anchors: Tensor, positions: Tensor, image: Tensor) -> Tensor:
    """Which tokens are one token or one row away from an anchor, in raster order within its image.

    Args:
        anchors: [G, N] bool.
        positions: [G, N, 2] float, rows and columns.
        image: [G, N] long, which image a token belongs to; -1 at padding.

    Returns:
        [G, N] bool.
    """
    if not anchors.numel():
        return anchors
    place = torch.arange(anchors.shape[1], device=anchors.device).expand_as(image)
    fresh = image.diff(dim=1) != 0
    low, high = ends(fresh, place)
    first, last = ends(fresh | (positions[..., 0].diff(dim=1).abs() > 1e-6), place)
    width = last - first + 1
    found = torch.zeros_like(anchors)
    for step in (-1, 1, -width, width):
        target = torch.minimum(torch.maximum(place + step, low), high)
        # Tokens that are no anchors mark one place too many, which is cut off.
        target = torch.where(anchors, target, anchors.shape[1])
        found |= torch.nn.functional.pad(torch.zeros_like(anchors), (0, 1)).scatter(1, target, True)[:, :-1]
    return found


def ends(fresh: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """First and last place [G, N] of each token's run; `fresh` [G, N - 1] bool is True where a new run begins."""
    run = torch.nn.functional.pad(fresh.long().cumsum(1), (1, 0))
    low = place.new_full(place.shape, place.shape[1]).scatter_reduce(1, run, place, "amin")
    high = place.new_zeros(place.shape).scatter_reduce(1, run, place, "amax")
    return low.gather(1, run), high.gather(1, run)
