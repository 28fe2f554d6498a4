"""SparseVLM: drop the visual tokens that the words which look at the picture look at least."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..engine.keepsets import VisualBatch
from . import register
from .pyramiddrop import PyramidDropSelector


@register("sparsevlm")
class SparseVLMSelector(PyramidDropSelector):
    """SparseVLM (Zhang et al., ICML 2025, arXiv 2410.04417), without its recycling of dropped tokens.

    Raters are the words that draw more of the picture than the average word does, as both enter the language model. At
    a few depths the visual tokens with least attention from the raters, in the layer before, are dropped. The paper
    lets the rank of each attention map decide how many; here the same share goes at every depth, such that the budget
    is left after the last. The paper also merges the best of the dropped tokens into a few new ones; here they are
    gone, so that figures of this selector are no figures of the paper.

    Args:
        depths: Where, as shares of the number of layers; the paper's 2, 6 and 15 of 32 by default.
    """

    def __init__(self, depths: Sequence[float] = (2 / 32, 6 / 32, 15 / 32)) -> None:
        super().__init__(depths)

    def stages(self, depth: int) -> list[tuple[int, int]]:
        """Drops after the given depths, each ranked by the layer before; depths that fall together count once."""
        ranking = dict.fromkeys(int(share * depth) for share in self.depths)
        return [(layer, layer + 1) for layer in ranking]

    def asking(self, batch: VisualBatch) -> Tensor:
        """The raters; the last token in rows without words."""
        return raters(batch)


def raters(batch: VisualBatch) -> Tensor:
    """[G, T] bool: words that draw the mean or more of the visual tokens' attention, each spread over the words."""
    logits = batch.tokens.float() @ batch.text.float().transpose(1, 2)
    spread = logits.masked_fill(~batch.text_mask[:, None], torch.finfo(logits.dtype).min).softmax(2)
    drawn = (spread * batch.mask[..., None]).sum(1) / batch.mask.sum(1, keepdim=True).clamp(min=1)
    mean = drawn.sum(1, keepdim=True) / batch.text_mask.sum(1, keepdim=True).clamp(min=1)
    return (drawn >= mean) & batch.text_mask
