"""Diversity: keep tokens that are as different from each other as can be."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.keepsets import VisualBatch
from . import register
from .base import Selector


@register("diversity")
class DiversitySelector(Selector):
    """DivPrune (Alvar et al., CVPR 2025, arXiv 2503.02175).

    Maximises the smallest cosine distance among the kept tokens, greedily: start from the token farthest from its
    nearest neighbour, then add, again and again, the token farthest from all that are kept.
    """

    def __call__(self, batch: VisualBatch) -> Tensor:
        """Return scores [G, N]: kept tokens in the order of their picks, above the others by their distance."""
        return maxmin_scores(batch.tokens, batch.mask, batch.budgets)


def maxmin_scores(tokens: Tensor, mask: Tensor, budgets: Tensor) -> Tensor:
    """Greedy max-min diversity for all groups at once.

    Args:
        tokens: [G, N, D] vectors.
        mask: [G, N] bool, True at real tokens.
        budgets: [G] long, tokens to pick.

    Returns:
        [G, N] float32. The picked tokens have whole numbers >= 2, falling in the order of their picks; the others a
        value in [0, 1] that grows with their distance to the picked ones; padding 0.
    """
    if not mask.numel():
        return torch.zeros_like(mask, dtype=torch.float32)
    unit = F.normalize(tokens.float(), dim=-1)
    distance = 1 - unit @ unit.transpose(1, 2)
    same = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    isolation = distance.masked_fill(same | ~mask[:, None], 2).amin(-1).masked_fill(~mask, -1)
    gap, scores = isolation, torch.zeros_like(isolation)
    wanted = torch.minimum(budgets, mask.sum(1))
    rows = torch.arange(len(mask), device=mask.device)
    for step in range(int(wanted.max())):
        pick = gap.argmax(-1)
        active = step < wanted
        scores[rows, pick] = torch.where(active, (wanted - step + 1).float(), scores[rows, pick])
        fresh = distance[rows, pick].masked_fill((scores > 0) | ~mask, -1)
        gap = torch.where(active[:, None], fresh if step == 0 else torch.minimum(gap, fresh), gap)
    return torch.where(scores > 0, scores, gap.clamp(0, 2) / 2).masked_fill(~mask, 0)
