"""PyramidDrop: drop visual tokens in steps, deeper and deeper in the language model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ConfigError
from . import register
from .inside import InsideSelector, layer_at


@register("pyramiddrop")
class PyramidDropSelector(InsideSelector):
    """PyramidDrop (Xing et al., CVPR 2025, arXiv 2410.17247).

    At each of a few depths the same share of the visual tokens is dropped: those with least attention from the last
    token in the layer that comes next. The share is such that the budget is left after the last drop.

    Args:
        depths: Where, as shares of the number of layers (see `layer_at`); the paper's 8, 16 and 24 of 32 by default.
    """

    def __init__(self, depths: Sequence[float] = (0.25, 0.5, 0.75)) -> None:
        depths = tuple(depths)
        if not depths or not all(0 < a < b <= 1 for a, b in zip(depths, (*depths[1:], 1.0), strict=True)):
            raise ConfigError(f"depths must rise within (0, 1), got {depths}")
        self.depths = depths

    def stages(self, depth: int) -> list[tuple[int, int]]:
        """Drops at the given depths, each ranked by the layer that comes next; depths that coincide count once."""
        return [(layer, layer) for layer in dict.fromkeys(layer_at(share, depth) for share in self.depths)]

    def left(self, totals: Tensor, budgets: Tensor, stage: int, stages: int) -> Tensor:
        """Falls by the same factor at every drop."""
        share = (budgets / totals.clamp(min=1)) ** ((stage + 1) / stages)
        return torch.maximum((totals * share).round().long(), budgets)
