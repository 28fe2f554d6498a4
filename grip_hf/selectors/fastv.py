"""FastV: drop visual tokens after the first layers of the language model."""

from __future__ import annotations

from torch import Tensor

from ..errors import ConfigError
from . import register
from .inside import InsideSelector


@register("fastv")
class FastVSelector(InsideSelector):
    """FastV (Chen et al., ECCV 2024, arXiv 2403.06764).

    All tokens pass the first `layers` layers; from then on only those stay that the last token attends to most, on
    average over heads, in the last of these layers.

    Args:
        layers: Layers with all tokens, >= 1; the paper's 2 by default.
    """

    def __init__(self, layers: int = 2) -> None:
        if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
            raise ConfigError(f"layers must be an integer >= 1, got {layers!r}")
        self.layers = layers

    def stages(self, depth: int) -> list[tuple[int, int]]:
        """One drop, ranked by the layer before it."""
        return [(self.layers - 1, self.layers)]

    def left(self, totals: Tensor, budgets: Tensor, stage: int, stages: int) -> Tensor:
        """The budget."""
        return budgets
