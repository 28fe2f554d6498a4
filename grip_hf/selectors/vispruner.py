"""VisPruner: what the vision tower looks at, and what differs most among the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.keepsets import VisualBatch, topk_mask
from ..errors import ConfigError
from . import register
from .base import Selector
from .taps import FEATURES, tap_features, tap_name, tap_vision

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

SALIENCE = tap_name("salience", None)
PER_STEP = 8


@register("vispruner")
class VisPrunerSelector(Selector):
    """VisPruner (Zhang et al., ICCV 2025, arXiv 2412.01818): important tokens, then diverse ones.

    A share of the budget goes to the tokens with most [CLS] attention. Of the others, duplicates are removed in steps:
    the tokens left, at first in the order of their attention, are dealt out to two sides in turn, and the up to 8 of
    the first side that are most similar to some token of the second go, until the budget is met; what stays of the
    first side then stands before the second, the most similar ones first. Similarity is that of the tower's features,
    or of the projected tokens where a visual token is made of several patches. The official code fails on an odd
    number of tokens left; here the first side has one more then.

    Args:
        important: Share of the budget for important tokens, in [0, 1].
    """

    needs: tuple[str, ...] = (SALIENCE, FEATURES)

    def __init__(self, important: float = 0.5) -> None:
        if isinstance(important, bool) or not 0 <= important <= 1:
            raise ConfigError(f"important must be a number in [0, 1], got {important!r}")
        self.important = important

    def prepare(self, model: PreTrainedModel) -> list[RemovableHandle]:
        """Tap the attention of the layer that feeds the language model, and its features."""
        features = tap_features(model)
        self.needs = (SALIENCE, FEATURES) if features else (SALIENCE,)
        return [*tap_vision(model, self.name, ["salience"]), *features]

    def __call__(self, batch: VisualBatch) -> Tensor:
        """Return scores [G, N]: 2 + attention for important tokens, 1 for diverse ones, 0 for the others."""
        salience = batch.taps[SALIENCE]
        count = (batch.budgets * self.important).long()
        important = topk_mask(salience, batch.mask, count)
        scores = torch.where(important, 2 + salience, 0.0)
        unit = F.normalize(batch.taps.get(FEATURES, batch.tokens).float(), dim=-1)
        similar = unit @ unit.transpose(1, 2)
        for row, wanted in enumerate((batch.budgets - count).tolist()):
            left = (batch.mask[row] & ~important[row]).nonzero().flatten()
            left = left[salience[row, left].argsort(descending=True, stable=True)]
            scores[row, without_duplicates(similar[row], left, wanted)] = 1
        return scores


def without_duplicates(similar: Tensor, left: Tensor, wanted: int) -> Tensor:
    """Thin out tokens until `wanted` are left: similar [N, N], left [M] long indices -> [wanted or M] long."""
    while len(left) > wanted:
        first, second = left[::2], left[1::2]
        go = min(PER_STEP, len(left) - wanted, len(first))
        if len(second):
            double = similar[first][:, second].amax(1)
            first = first[double.argsort(descending=True, stable=True)]
        left = torch.cat([first[go:], second])
    return left
