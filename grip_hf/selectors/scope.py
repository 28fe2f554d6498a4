"""SCOPE: salient tokens that cover what is not covered yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from ..engine.keepsets import VisualBatch
from ..errors import ConfigError
from . import register
from .base import Selector
from .coverage import greedy_coverage
from .taps import FEATURES, tap_features, tap_name, tap_vision

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

SALIENCE = tap_name("salience", None)


@register("scope")
class ScopeSelector(Selector):
    """SCOPE (Deng et al., NeurIPS 2025, arXiv 2510.24214): saliency times what a token adds to coverage, greedily.

    A token covers another as far as the cosine of the tower's features goes (of the projected tokens, where one is
    made of several patches), if it is positive. Saliency is [CLS] attention.

    Args:
        power: Exponent of the saliency, >= 0; the official 1 by default.
    """

    needs: tuple[str, ...] = (SALIENCE, FEATURES)

    def __init__(self, power: float = 1.0) -> None:
        if isinstance(power, bool) or not power >= 0:
            raise ConfigError(f"power must be a number >= 0, got {power!r}")
        self.power = power

    def prepare(self, model: PreTrainedModel) -> list[RemovableHandle]:
        """Tap attention and features; raises `UnsupportedModelError` if the tower is of an unknown kind."""
        features = tap_features(model)
        self.needs = (SALIENCE, FEATURES) if features else (SALIENCE,)
        return [*tap_vision(model, self.name, ["salience"]), *features]

    def __call__(self, batch: VisualBatch) -> Tensor:
        """Return scores [G, N]: kept tokens in the order of their picks, above the others."""
        unit = F.normalize(batch.taps.get(FEATURES, batch.tokens).float(), dim=-1)
        cover = (unit @ unit.transpose(1, 2)) * batch.mask[..., None]
        return greedy_coverage(cover, batch.mask, batch.budgets, batch.taps[SALIENCE].double() ** self.power)
