"""[CLS] attention: keep the patches that the vision tower itself looks at."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..engine.keepsets import VisualBatch
from . import register
from .base import Selector
from .taps import Layer, tap_name, tap_vision

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel


@register("cls_attention")
class ClsAttentionSelector(Selector):
    """FasterVLM (Zhang et al., 2024, arXiv 2412.01818): attention from [CLS] to the patches, averaged over heads.

    Taken in the layer whose output the language model gets (the last but one in LLaVA-1.5). A tower without [CLS]
    gives the attention that a patch receives from all patches instead, as VisionZip does for such towers.

    Args:
        layer: Another layer of the tower, by its index or by its depth as a share of all.
    """

    def __init__(self, layer: Layer = None) -> None:
        self.layer = layer
        self.needs = (tap_name("salience", layer),)

    def prepare(self, model: PreTrainedModel) -> list[RemovableHandle]:
        """Tap the layer's attention.

        Raises:
            UnsupportedModelError: The tower has no such layer, or its patches are not the visual tokens.
        """
        return tap_vision(model, self.name, ["salience"], self.layer)

    def __call__(self, batch: VisualBatch) -> Tensor:
        """Return scores [G, N] in [0, 1]."""
        return batch.taps[self.needs[0]]
