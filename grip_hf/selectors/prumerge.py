"""PruMerge+: outliers of attention, evenly spaced tokens, and their surroundings merged into them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.keepsets import VisualBatch, topk_mask
from ..errors import ConfigError
from . import register
from .merging import MergingSelector
from .taps import FEATURES, tap_name

LAST = -1
SALIENCE, KEYS = tap_name("joint_salience", LAST), tap_name("keys", LAST)


@register("prumerge")
class PruMergeSelector(MergingSelector):
    """PruMerge+ of LLaVA-PruMerge (Shang et al., ICCV 2025, arXiv 2403.15388), at a given budget.

    Tokens whose [CLS] attention is an outlier (above the third quartile by 1.5 interquartile ranges) come first; what
    is left of the budget goes to tokens evenly spaced, in raster order from the first one on, among those that remain.
    Each kept token then adds the `neighbours` tokens with the nearest keys, kept ones too, weighted by attention,
    before the projector. As in the official code, attention and keys are those of the last layer, all heads as one.

    Two things follow from a given budget: the official code spaces about three times as many tokens as there are
    outliers, and adds one token more, the weighted sum of all that is dropped. Here the budget says how many are
    spaced, and that one token is left out, for there is no place in the picture that is its own.

    Args:
        neighbours: Tokens that a kept one takes in.
    """

    attended, layer = ("joint_salience", "keys"), LAST

    def __init__(self, neighbours: int = 32) -> None:
        super().__init__()
        if isinstance(neighbours, bool) or not isinstance(neighbours, int) or neighbours < 1:
            raise ConfigError(f"neighbours must be an integer >= 1, got {neighbours!r}")
        self.neighbours = neighbours

    def __call__(self, batch: VisualBatch) -> Tensor:
        """Return scores [G, N]: 2 + attention for outliers, 1 for evenly spaced tokens, 0 for the others."""
        salience = batch.taps[SALIENCE]
        scores = torch.zeros_like(salience)
        for row, budget in enumerate(torch.minimum(batch.budgets, batch.mask.sum(1)).tolist()):
            real = batch.mask[row].nonzero().flatten()
            low, high = salience[row, real].quantile(salience.new_tensor([0.25, 0.75])) if len(real) else (0, 0)
            outlier = salience[row] > high + 1.5 * (high - low)
            first = topk_mask(salience[row, None], (outlier & batch.mask[row])[None], batch.budgets[row, None])[0]
            rest = real[~first[real]]
            number = budget - int(first.sum())
            scores[row, rest[torch.arange(number, device=rest.device) * len(rest) // max(number, 1)]] = 1
            scores[row, first] = 2 + salience[row, first]
        return scores

    def merge_features(self, batch: VisualBatch, keep: Tensor) -> Tensor:
        """Each token plus the attention-weighted sum of its nearest others; only kept tokens matter."""
        features, keys = batch.taps[FEATURES].float(), F.normalize(batch.taps[KEYS].float(), dim=-1)
        itself = torch.eye(keep.shape[1], dtype=torch.bool, device=keep.device)
        similar = (keys @ keys.transpose(1, 2)).masked_fill(~batch.mask[:, None] | itself, -2)
        nearest = similar.topk(min(self.neighbours, keep.shape[1]), dim=-1)
        weight = batch.taps[SALIENCE][:, None].expand_as(similar).gather(2, nearest.indices)
        near = torch.zeros_like(similar).scatter(2, nearest.indices, weight.masked_fill(nearest.values < -1, 0))
        return features + near @ features
