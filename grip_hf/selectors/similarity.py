"""Similarity: keep the tokens that look most like the words of the question."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..engine.keepsets import VisualBatch
from ..errors import ConfigError
from ..scorer.hints import cosines, lengths
from . import register
from .base import Selector


@register("similarity")
class SimilaritySelector(Selector):
    """Cosine between a projected visual token and the prompt's word embeddings.

    The plainest text-guided criterion. It is the relevance term of CDPruner (Zhang et al., 2025, arXiv 2506.10967),
    but in the embedding space of the language model, so that no text encoder is needed beside it.

    Args:
        pooling: `"mean"` or `"max"` over the words. Without words all scores are 0.
    """

    def __init__(self, pooling: Literal["mean", "max"] = "mean") -> None:
        if pooling not in ("mean", "max"):
            raise ConfigError(f"pooling must be 'mean' or 'max', got {pooling!r}")
        self.pooling = pooling

    def __call__(self, batch: VisualBatch) -> Tensor:
        """Return scores [G, N] in [-1, 1]."""
        norms = lengths(batch.tokens)
        words = batch.text_mask[:, None]
        similar = cosines(batch.tokens.float(), norms, batch.text.float())
        if self.pooling == "mean":
            return similar.masked_fill(~words, 0).sum(-1) / words.sum(-1).clamp(min=1)
        floor = similar.new_full((*similar.shape[:2], 1), -1)
        best = torch.cat([similar.masked_fill(~words, -1), floor], -1).amax(-1)
        return best.masked_fill(~words.any(-1), 0)
