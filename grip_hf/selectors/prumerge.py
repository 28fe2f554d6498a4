"""PruMerge+: outliers of attention, evenly spaced tokens, and the rest merged into them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.keepsets import VisualBatch, topk_mask
from ..errors import ConfigError
from . import register
from .grid import snake
from .merging import FEATURES, KEYS, SALIENCE, MergingSelector


@register("prumerge")
class PruMergeSelector(MergingSelector):
    """PruMerge+ of LLaVA-PruMerge (Shang et al., ICCV 2025, arXiv 2403.15388), at a given budget.

    Tokens whose [CLS] attention is an outlier (above the third quartile by 1.5 interquartile ranges) come first; what
    is left of the budget goes to tokens spread evenly over those that remain. Each kept token then adds its
    `neighbours` nearest dropped tokens by key, weighted by their attention, before the projector. The paper's own
    token count follows from the outliers; here it is the budget's.

    Args:
        neighbours: Dropped tokens that a kept one takes in.
    """

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
            order = snake(
                batch.positions[row, rest].float().cpu(),
                batch.image_index[row, rest].cpu(),
                number / max(len(rest), 1),
            )
            ranks = ((torch.arange(number) + 0.5) * len(rest) / max(number, 1)).long()
            scores[row, rest[order[ranks].to(rest.device)]] = 1
            scores[row, first] = 2 + salience[row, first]
        return scores

    def merge_features(self, batch: VisualBatch, keep: Tensor) -> Tensor:
        """Kept tokens plus the attention-weighted sum of their nearest dropped ones."""
        features, keys = batch.taps[FEATURES].float(), F.normalize(batch.taps[KEYS].float(), dim=-1)
        others = batch.mask & ~keep
        similar = (keys @ keys.transpose(1, 2)).masked_fill(~others[:, None], -2)
        nearest = similar.topk(min(self.neighbours, keep.shape[1]), dim=-1)
        weight = batch.taps[SALIENCE][:, None].expand_as(similar).gather(2, nearest.indices)
        near = torch.zeros_like(similar).scatter(2, nearest.indices, weight.masked_fill(nearest.values < -1, 0))
        return features + near @ features
