"""Greedy choice of the tokens that cover most."""

from __future__ import annotations

import torch
from torch import Tensor


def greedy_coverage(cover: Tensor, mask: Tensor, budgets: Tensor, weight: Tensor | None = None) -> Tensor:
    """Pick, again and again, the token that adds most to how well all rows are covered, for all groups at once.

    A row is covered as well as by the best token picked so far, and not at all at the start.

    Args:
        cover: [G, R, N], how well token n covers row r; rows of padding 0.
        mask: [G, N] bool, True at real tokens.
        budgets: [G] long, tokens to pick.
        weight: [G, N] factors of what each token adds; None means 1.

    Returns:
        [G, N] float32: whole numbers >= 2 for the picks, falling in their order; for the others a value in [0, 1) that
        grows with what they would add; 0 at padding.
    """
    if not mask.numel():
        return torch.zeros_like(mask, dtype=torch.float32)
    # Double precision: sums over rows must not depend on how many rows of padding follow.
    cover, weight = cover.double(), None if weight is None else weight.double()
    best = cover.new_zeros(cover.shape[:2])
    scores = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    wanted, rows = torch.minimum(budgets, mask.sum(1)), torch.arange(len(mask), device=mask.device)

    def gains() -> Tensor:
        added = (cover - best[..., None]).clamp(min=0).sum(1)
        return added if weight is None else added * weight

    for step in range(int(wanted.max())):
        pick = gains().masked_fill((scores > 0) | ~mask, -torch.inf).argmax(1)
        active = step < wanted
        scores[rows, pick] = torch.where(active, (wanted - step + 1).float(), scores[rows, pick])
        reached = torch.maximum(best, cover[rows, :, pick])
        best = torch.where(active[:, None], reached, best)
    left = gains().clamp(min=0)
    return torch.where(scores > 0, scores, (left / (1 + left)).float()).masked_fill(~mask, 0)
