"""Scores that change while tokens are picked: what is kept already speaks for or against those that are left.

Every token has two short vectors: what it gives to the memory of the kept ones once it is picked, and what it takes
from that memory before. Its score at any moment is its own plus what it takes of the mean of what was given, so that a
pick costs one small matrix-vector product, and the chance of a whole sequence of picks is still exact, pick by pick.
The mean, since a sum grows with the budget: trained on sums, such a scorer soon kept the wrong tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Rated(NamedTuple):
    """What a scorer says of the tokens of each group.

    Attributes:
        scores: [G, N] float32, before anything is picked; 0 at padding.
        give: [G, N, M] float32, what a token adds to the memory once it is picked; None for a scorer without memory.
        take: [G, N, M] float32, what of the memory a token's score is changed by; None likewise.
    """

    scores: Tensor
    give: Tensor | None = None
    take: Tensor | None = None

    def rows(self, index: Tensor) -> Rated:
        """The same of other groups: index [R] long, a group of this one each."""
        if self.give is None or self.take is None:
            return Rated(self.scores[index])
        return Rated(self.scores[index], self.give[index], self.take[index])


class Memory(nn.Module):
    """The two vectors of each token. It starts as no memory: nothing is taken.

    Args:
        width: Of the scorer.
        size: M, numbers in a vector.
    """

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.give, self.take = nn.Linear(width, size), nn.Linear(width, size)

    @torch.no_grad()
    def start_empty(self) -> None:
        """Let nothing be taken; what is given stays as it was drawn, so that there is a gradient."""
        self.take.weight.zero_()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features [G, N, W] to what each token gives and takes, [G, N, M] float32."""
        return self.give(x).float().tanh(), self.take(x).float()


def scores_before_picks(rated: Rated, picks: Tensor) -> Tensor:
    """The scores that each pick of a sequence was drawn by.

    Args:
        rated: Of G groups.
        picks: [G, K] long, in the order of picking; padded with any token.

    Returns:
        [G, K, N] float32, those of tokens that were picked already included.
    """
    if rated.give is None or rated.take is None:
        return rated.scores[:, None].expand(-1, picks.shape[1], -1)
    given = rated.give.gather(1, picks[..., None].expand(-1, -1, rated.give.shape[-1]))
    before = torch.arange(picks.shape[1], device=picks.device).clamp(min=1)
    memory = (given.cumsum(1) - given) / before[:, None]
    return rated.scores[:, None] + memory @ rated.take.transpose(1, 2)


def pick_in_turn(rated: Rated, mask: Tensor, budgets: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Pick the best token again and again.

    Args:
        rated: Of G groups.
        mask: [G, N] bool, True at real tokens.
        budgets: [G] long, tokens to pick.
        noise: [G, K, N] added to the scores before each pick, or None. With Gumbel noise every pick is a draw.

    Returns:
        Picks [G, K] long with K the largest number of them, -1 where a group has fewer; and the scores [G, N] of all
        tokens after the last pick.
    """
    wanted = torch.minimum(budgets.clamp(min=0), mask.sum(1))
    width = int(wanted.max()) if wanted.numel() else 0
    picks = wanted.new_full((len(mask), width), -1)
    scores, left = rated.scores, mask.clone()
    given = None if rated.give is None else torch.zeros_like(rated.give[:, 0])
    rows = torch.arange(len(mask), device=mask.device)
    for step in range(width):
        active = step < wanted
        noisy = scores if noise is None else scores + noise[:, step]
        pick = noisy.masked_fill(~left, -torch.inf).argmax(1)
        picks[:, step] = torch.where(active, pick, -1)
        left[rows, pick] &= ~active
        if given is not None and rated.give is not None and rated.take is not None:
            given = given + rated.give[rows, pick]
            change = (rated.take @ given[..., None] / (step + 1)).squeeze(-1)
            scores = torch.where(active[:, None], rated.scores + change, scores)
    return picks, scores


def as_scores(picks: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """Scores that rank tokens as they were picked, for those who keep the best ones.

    Args:
        picks: [G, K] long, -1 where a group has fewer.
        scores: [G, N] float, which rank the tokens that were not picked.
        mask: [G, N] bool, True at real tokens.

    Returns:
        [G, N] float32: whole numbers >= 2, falling in the order of the picks, then values in [0, 1]; padding 0.
    """
    real = picks >= 0
    ranks = (real.sum(1, keepdim=True) + 1 - torch.arange(picks.shape[1], device=picks.device)).float()
    # One column more, where what is no pick goes.
    found = torch.zeros_like(scores[:, :1]).expand(-1, mask.shape[1] + 1).clone()
    found.scatter_(1, picks.masked_fill(~real, mask.shape[1]), ranks.where(real, 0.0))
    return torch.where(found[:, :-1] > 0, found[:, :-1], scores.sigmoid()).masked_fill(~mask, 0)
