"""VisionZip: the tokens the vision tower looks at, and summaries of the rest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.keepsets import VisualBatch, topk_mask
from ..errors import ConfigError
from . import register
from .merging import MergingSelector
from .taps import FEATURES, tap_name

SALIENCE, KEYS = tap_name("salience", None), tap_name("mean_keys", None)


@register("visionzip")
class VisionZipSelector(MergingSelector):
    """VisionZip (Yang et al., CVPR 2025, arXiv 2412.04467): dominant tokens, and contextual ones that are merged.

    Most of the budget goes to the tokens with most [CLS] attention (dominant). Of the others, evenly spaced ones
    become targets (contextual); each of those left joins the target with the most similar key, and a target is its
    own features plus the mean of those that joined it, before the projector. The official code hands the language
    model [CLS] too, one more than the tokens it counts; in Hugging Face models [CLS] is no visual token, so that the
    budget is met without it.

    Args:
        contextual: Share of the budget for contextual tokens, in [0, 1]; the paper's 10 of 64 by default.
    """

    attended = ("salience", "mean_keys")

    def __init__(self, contextual: float = 10 / 64) -> None:
        super().__init__()
        if isinstance(contextual, bool) or not 0 <= contextual <= 1:
            raise ConfigError(f"contextual must be a number in [0, 1], got {contextual!r}")
        self.contextual = contextual

    def dominant(self, batch: VisualBatch) -> Tensor:
        """[G, N] bool: the dominant tokens."""
        count = batch.budgets - (batch.budgets * self.contextual).round().long()
        return topk_mask(batch.taps[SALIENCE], batch.mask, count)

    def __call__(self, batch: VisualBatch) -> Tensor:
        """Return scores [G, N]: 2 + attention for dominant tokens, 1 for targets, 0 for the others."""
        dominant = self.dominant(batch)
        scores = torch.where(dominant, 2 + batch.taps[SALIENCE], 0.0)
        budgets = torch.minimum(batch.budgets, batch.mask.sum(1))
        for row, targets in enumerate((budgets - dominant.sum(1)).tolist()):
            rest = (batch.mask[row] & ~dominant[row]).nonzero().flatten()
            scores[row, rest[:: max(1, len(rest) // max(targets, 1))][:targets]] = 1
        return scores

    def merge_features(self, batch: VisualBatch, keep: Tensor) -> Tensor:
        """Targets plus the mean of what joins them; dominant tokens as they are."""
        features, keys = batch.taps[FEATURES].float(), F.normalize(batch.taps[KEYS].float(), dim=-1)
        targets, others = keep & ~self.dominant(batch), batch.mask & ~keep
        similar = (keys @ keys.transpose(1, 2)).masked_fill(~targets[:, None], -2)
        joins = F.one_hot(similar.argmax(-1), keep.shape[1]) * (others & targets.any(1, keepdim=True))[..., None]
        joined = joins.transpose(1, 2).to(features)
        return features + joined @ features / joined.sum(-1, keepdim=True).clamp(min=1)
