"""[CLS] attention: keep the patches that the vision tower itself looks at."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..selection import VisualBatch
from . import register
from .base import Selector
from .vision_taps import Attended, tap_attention

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel


@register("cls_attention")
class ClsAttentionSelector(Selector):
    """FasterVLM (Zhang et al., 2024, arXiv 2412.01818): attention from [CLS] to the patches, averaged over heads.

    Taken in the layer whose output the language model gets (the last but one in LLaVA-1.5). A tower without [CLS]
    gives the attention that a patch receives from all patches instead, as VisionZip does for such towers.

    Args:
        layer: Index of another layer of the tower.
    """

    needs = ("vision_attention",)

    def __init__(self, layer: int | None = None) -> None:
        self.layer = layer

    def prepare(self, model: PreTrainedModel) -> list[RemovableHandle]:
        """Tap the layer's attention.

        Raises:
            UnsupportedModelError: The tower has no such layer, or its patches are not the visual tokens.
        """
        return tap_attention(model, self.name, {"vision_attention": Attended.importance}, self.layer)

    def __call__(self, batch: VisualBatch) -> Tensor:
        """Return scores [G, N] in [0, 1]."""
        return batch.taps["vision_attention"]
