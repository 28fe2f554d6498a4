"""CDPruner: tokens that fit the question and differ from each other."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.keepsets import VisualBatch
from ..errors import ConfigError
from . import register
from .base import Selector
from .similarity import SimilaritySelector

NO_VOLUME = 1e-6  # less than this is rounding: such tokens lie in the span of those picked


@register("cdpruner")
class CDPrunerSelector(Selector):
    """CDPruner (Zhang et al., NeurIPS 2025, arXiv 2506.10967): a determinantal point process given the question.

    The kernel of two tokens is their cosine similarity times the relevance of each; the set of greatest determinant is
    found greedily. Relevance is the cosine to the words in the language model's embedding space, scaled to [0, 1] per
    sample, as the paper does for models without a CLIP text encoder beside them. The official code for LLaVA takes
    CLIP's text encoder instead, and the *negative* similarity to it; in the language model's space the sign is plus.

    Args:
        relevance: The paper's `"mean"` over the words, or `"max"`; registered as `cdpruner_max` too.
    """

    def __init__(self, relevance: Literal["mean", "max"] = "mean") -> None:
        if relevance not in ("mean", "max"):
            raise ConfigError(f"relevance must be 'mean' or 'max', got {relevance!r}")
        self.similarity = SimilaritySelector(relevance)

    def __call__(self, batch: VisualBatch) -> Tensor:
        """Return scores [G, N]: kept tokens in the order of their picks, above the others."""
        relevance = to_unit_range(self.similarity(batch), batch.mask)
        unit = F.normalize(batch.tokens.float(), dim=-1) * relevance[..., None]
        return greedy_determinant(unit, batch.mask, batch.budgets)


@register("cdpruner_max")
class CDPrunerMaxSelector(CDPrunerSelector):
    """CDPruner with the most similar word of the question as relevance: a variant of ours, stronger than the paper's.

    A token about one word of the question is not held against the others that it has nothing to do with.
    """

    def __init__(self) -> None:
        super().__init__("max")


def to_unit_range(values: Tensor, mask: Tensor) -> Tensor:
    """Scale the real values [G, N] of each group to (0, 1]; 0 at padding, all 1 where they are equal."""
    if not values.numel():
        return values
    low = values.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    high = values.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    spread = high - low
    scaled = torch.where(spread > 0, (values - low + 1e-6) / (spread + 1e-6), torch.ones_like(values))
    return scaled.masked_fill(~mask, 0)


def greedy_determinant(features: Tensor, mask: Tensor, budgets: Tensor) -> Tensor:
    """Greedy maximum a-posteriori choice of a determinantal point process, for all groups at once.

    Each pick is the token that adds most volume to those picked, kept up by a Cholesky factor one column at a time
    (Chen et al., NeurIPS 2018, arXiv 1709.05135).

    Args:
        features: [G, N, D] vectors whose inner products are the kernel.
        mask: [G, N] bool, True at real tokens.
        budgets: [G] long, tokens to pick.

    Returns:
        [G, N] float32: whole numbers >= 2 for the picks, falling in their order; for the others the volume that they
        would add, below 2; 0 at padding.
    """
    if not mask.numel():
        return torch.zeros_like(mask, dtype=torch.float32)
    kernel = (features @ features.transpose(1, 2)).double()
    gain = kernel.diagonal(dim1=1, dim2=2).masked_fill(~mask, -torch.inf)
    wanted = torch.minimum(budgets, mask.sum(1))
    scores = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    rows, steps = torch.arange(len(mask), device=mask.device), int(wanted.max())
    factor = kernel.new_zeros(len(mask), steps, mask.shape[1])
    for step in range(steps):
        pick = gain.argmax(1)
        active = step < wanted
        scores[rows, pick] = torch.where(active, (wanted - step + 1).float(), scores[rows, pick])
        known = (factor[rows, :step, pick][..., None] * factor[:, :step]).sum(1)
        volume = gain[rows, pick, None]
        column = torch.where(volume > NO_VOLUME, (kernel[rows, pick] - known) / volume.clamp(min=NO_VOLUME).sqrt(), 0)
        factor[:, step] = column
        left = gain - column.square()
        left = left.masked_fill(left < NO_VOLUME, 0).masked_fill((scores > 0) | ~mask, -torch.inf)
        gain = torch.where(active[:, None], left, gain)
    return torch.where(scores > 0, scores, gain.clamp(0, 1).float())
