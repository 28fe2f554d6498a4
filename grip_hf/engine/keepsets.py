"""From scores and budgets to keep-sets: top-k, and Plackett-Luce sampling.

Pure tensor functions. `scores` is [G, N] float, `mask` [G, N] bool (True = real token), `budgets` [G] long. A *group*
is a sample, or one image of it. An *order* [G, K] long lists picks in the order they were made, with -1 where a group
has fewer than K picks.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..errors import NonFiniteScoreError


@dataclasses.dataclass(frozen=True)
class VisualBatch:
    """What a selector sees: one row per group; all tensors on one device.

    Attributes:
        tokens: [G, N, D] projected visual tokens, zeros at padding.
        mask: [G, N] bool, True at real tokens.
        text: [G, T, D] embeddings of the prompt's text tokens (no visual tokens, no padding), zeros at padding.
        text_mask: [G, T] bool, True at real text tokens.
        budgets: [G] long, tokens to keep.
        positions: [G, N, 2] float, (row, column) of the token within its image, in [0, 1].
        image_index: [G, N] long, which image of the sample the token belongs to.
        taps: extra features per token that the selector asked for, each [G, N, ...].
        text_index: [G, T] long, where each text token stands in its row of the call, 0 at padding; None where there
            is no call.
        token_index: [G, N] long, where each visual token stands there, 0 at padding; None where there is no call.
        totals: [G] long, visual tokens of each group, those too that cannot stay since the vision tower dropped their
            rows; None where all are here.
    """

    tokens: Tensor
    mask: Tensor
    text: Tensor
    text_mask: Tensor
    budgets: Tensor
    positions: Tensor
    image_index: Tensor
    taps: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    text_index: Tensor | None = None
    token_index: Tensor | None = None
    totals: Tensor | None = None

    @property
    def keep_ratio(self) -> Tensor:
        """[G] float32 share of each group's visual tokens that stays, at most 1."""
        totals = self.mask.sum(1) if self.totals is None else self.totals
        return (self.budgets / totals.clamp(min=1)).clamp(max=1).float()


def check_finite(scores: Tensor, mask: Tensor) -> None:
    """Raise `NonFiniteScoreError` if a real token has a score that is NaN or infinite."""
    bad = ~torch.isfinite(scores) & mask
    if bool(bad.any()):
        group, token = (int(i) for i in bad.nonzero()[0])
        raise NonFiniteScoreError(
            f"the selector gave score {float(scores[group, token])} to visual token {token} of group {group} "
            f"({int(bad.sum())} non-finite scores in all); scores must be finite"
        )


def topk_mask(scores: Tensor, mask: Tensor, budgets: Tensor) -> Tensor:
    """Keep the best-scored tokens of each group.

    Returns:
        [G, N] bool with exactly `min(budget, real tokens)` True per row; ties go to the lower index.

    Raises:
        NonFiniteScoreError: A real token has a NaN or infinite score.
    """
    check_finite(scores, mask)
    ranked = scores.masked_fill(~mask, 0).argsort(dim=1, descending=True, stable=True)
    # A second stable sort moves padding behind every real token, whatever its score.
    ranked = ranked.gather(1, mask.gather(1, ranked).byte().argsort(dim=1, descending=True, stable=True))
    wanted = torch.minimum(budgets.clamp(min=0), mask.sum(1))
    chosen = torch.arange(scores.shape[1], device=scores.device) < wanted[:, None]
    return torch.zeros_like(mask).scatter(1, ranked, chosen)


def gumbel_topk(
    scores: Tensor,
    mask: Tensor,
    budgets: Tensor,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Draw ordered picks without replacement from the Plackett-Luce distribution over `scores / temperature`.

    Returns:
        [G, Kmax] long with Kmax = the largest number of picks; -1 where a group has fewer.

    Raises:
        NonFiniteScoreError: A real token has a NaN or infinite score.
        ValueError: `temperature` is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature!r}")
    check_finite(scores, mask)
    # Double precision: a float32 uniform can be 0 and has visible ties at large N.
    noise = torch.empty(scores.shape, dtype=torch.float64, device=scores.device).exponential_(generator=generator)
    keys = scores.double() / temperature - noise.log()
    ranked = keys.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    wanted = torch.minimum(budgets.clamp(min=0), mask.sum(1))
    width = int(wanted.max()) if wanted.numel() else 0
    chosen = torch.arange(width, device=scores.device) < wanted[:, None]
    return ranked[:, :width].masked_fill(~chosen, -1)
