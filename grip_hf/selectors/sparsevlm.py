"""SparseVLM: drop the visual tokens that the words which look at the picture look at least."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..engine.keepsets import VisualBatch
from . import register
from .inside import EARLIEST
from .pyramiddrop import PyramidDropSelector
from .words import words_behind


@register("sparsevlm")
class SparseVLMSelector(PyramidDropSelector):
    """SparseVLM (Zhang et al., ICML 2025, arXiv 2410.04417), without its recycling of dropped tokens.

    Raters are the words behind the last picture that draw more of the pictures than the average of these words does,
    as both enter the language model; the prompt's last token where there are none. At a few depths the visual tokens
    with least attention from the raters are dropped after the layer. The official code has lists of how many for
    LLaVA-1.5; here the same share goes at every depth, such that the budget is left after the last. It also merges
    the best of the dropped tokens into a few new ones; here they are gone, so that figures of this selector are no
    figures of the paper.

    Args:
        depths: Layers that rank, as shares of their number; the paper's 2, 6 and 15 of 32 by default. The drop comes
            after them, no earlier than in the other methods (see `inside.layer_at`).
    """

    def __init__(self, depths: Sequence[float] = (2 / 32, 6 / 32, 15 / 32)) -> None:
        super().__init__(depths)

    def stages(self, depth: int) -> list[tuple[int, int]]:
        """Drops after the layers that rank; depths that fall together count once."""
        ranking = dict.fromkeys(max(EARLIEST - 1, int(share * depth)) for share in self.depths)
        return [(layer, layer + 1) for layer in ranking]

    def asking(self, batch: VisualBatch) -> Tensor:
        """The raters; the last token in rows without any."""
        return raters(batch.tokens, batch.mask, batch.text, words_behind(batch))


def raters(tokens: Tensor, mask: Tensor, text: Tensor, words: Tensor) -> Tensor:
    """Words that draw more than the mean of the visual tokens' attention, each token's spread over the words.

    Args:
        tokens: [G, N, D] visual tokens.
        mask: [G, N] bool, True at real ones.
        text: [G, T, D] text tokens.
        words: [G, T] bool, the words that may rate.

    Returns:
        [G, T] bool; none where all words draw the same.
    """
    logits = tokens.float() @ text.float().transpose(1, 2)
    spread = logits.masked_fill(~words[:, None], torch.finfo(logits.dtype).min).softmax(2)
    drawn = (spread * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    mean = (drawn * words).sum(1, keepdim=True) / words.sum(1, keepdim=True).clamp(min=1)
    return (drawn > mean) & words
