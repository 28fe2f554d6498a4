"""SparseVLM-style relevance: the words that look at the picture say which tokens matter."""

from __future__ import annotations

import torch
from torch import Tensor

from ..selection import VisualBatch
from . import register
from .base import Selector


@register("sparsevlm")
class SparseVLMSelector(Selector):
    """Text raters of SparseVLM (Zhang et al., ICML 2025, arXiv 2410.04417), before the language model.

    The paper picks as raters the words that attend to the picture more than the average word does, and scores a visual
    token by the attention that the raters pay it inside the language model, layer after layer. Here both come from one
    softmax between words and visual tokens as they enter the language model, so that all layers are spared; its
    recycling of dropped tokens is left out. Figures of this variant are not figures of the paper: where visual tokens
    look like words, the background chooses the raters.
    """

    def __call__(self, batch: VisualBatch) -> Tensor:
        """Return scores [G, N] in [0, 1]; all 0 without words."""
        tokens, words = batch.tokens.float(), batch.text.float()
        logits = words @ tokens.transpose(1, 2) * tokens.shape[-1] ** -0.5
        pair = batch.text_mask[:, :, None] & batch.mask[:, None]
        if not logits.numel():
            return torch.zeros_like(batch.mask, dtype=torch.float32)
        # How much of a visual token's attention, spread over the words, each word draws.
        drawn = logits.masked_fill(~pair, -1e9).softmax(1).masked_fill(~pair, 0).sum(2) / batch.mask.sum(
            1, keepdim=True
        )
        mean = drawn.sum(1, keepdim=True) / batch.text_mask.sum(1, keepdim=True).clamp(min=1)
        raters = (drawn >= mean) & batch.text_mask
        paid = logits.masked_fill(~pair, -1e9).softmax(2).masked_fill(~pair, 0)
        return (paid * raters[..., None]).sum(1) / raters.sum(1, keepdim=True).clamp(min=1)
