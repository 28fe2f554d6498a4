"""FastV: drop visual tokens after the first layers of the language model."""

from __future__ import annotations

from torch import Tensor

from ..errors import ConfigError
from . import register
from .inside import InsideSelector, layer_at

PAPER = 2 / 32


@register("fastv")
class FastVSelector(InsideSelector):
    """FastV (Chen et al., ECCV 2024, arXiv 2403.06764).

    All tokens pass the first `layers` layers; from then on only those stay that the last token attends to most, on
    average over heads, in the last of these layers.

    Args:
        layers: Layers with all tokens, >= 1; None takes the share of the paper's 2 of 32 (see `layer_at`), which is 2
            up to 47 layers.
    """

    def __init__(self, layers: int | None = None) -> None:
        if layers is not None and (isinstance(layers, bool) or not isinstance(layers, int) or layers < 1):
            raise ConfigError(f"layers must be an integer >= 1, got {layers!r}")
        self.layers = layers

    def stages(self, depth: int) -> list[tuple[int, int]]:
        """One drop, ranked by the layer before it."""
        layers = layer_at(PAPER, depth) if self.layers is None else self.layers
        return [(layers - 1, layers)]

    def left(self, totals: Tensor, budgets: Tensor, stage: int, stages: int) -> Tensor:
        """The budget."""
        return budgets
