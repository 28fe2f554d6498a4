"""Selectors that fold dropped tokens into kept ones."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..engine.context import publish
from ..engine.keepsets import VisualBatch
from ..errors import UnsupportedModelError
from ..families.table import find_parts
from .base import Selector
from .taps import find_tower, tap_name, tap_vision

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

SALIENCE, KEYS, FEATURES = tap_name("salience", None), tap_name("mean_keys", None), "vision.features"


class MergingSelector(Selector):
    """Chooses by the vision tower's attention, and merges features before the projector, as the papers do.

    A subclass writes `__call__` and `merge_features`.
    """

    needs = (SALIENCE, KEYS, FEATURES)

    def __init__(self) -> None:
        self._projector: Any = None

    def prepare(self, model: PreTrainedModel) -> list[RemovableHandle]:
        """Tap attention, keys and features; raises `UnsupportedModelError` if the tower cannot give them."""
        base: Any = find_parts(model).base
        if find_tower(model, self.name)[2].merge > 1 or not hasattr(base, "multi_modal_projector"):
            raise UnsupportedModelError(
                f"selector {self.name!r} merges what the projector gets, which needs one visual token per patch; "
                f"{type(model).__name__} makes one of several"
            )
        self._projector = base.multi_modal_projector
        handles = tap_vision(model, self.name, ["salience", "mean_keys"])
        return [*handles, self._projector.register_forward_pre_hook(publish_features)]

    def merge(self, batch: VisualBatch, keep: Tensor) -> Tensor:
        """New embeddings of the kept tokens.

        Args:
            batch: What was chosen from.
            keep: [G, N] bool, what was chosen.

        Returns:
            [G, N, D]; only the kept tokens matter.
        """
        merged = self.merge_features(batch, keep)
        # Its forward, not a call: the projector's hooks belong to pictures.
        return self._projector.forward(merged.to(batch.taps[FEATURES]))

    @abstractmethod
    def merge_features(self, batch: VisualBatch, keep: Tensor) -> Tensor:
        """Features [G, N, C] float32 before the projector, with dropped tokens folded into kept ones."""


def publish_features(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Hook of the projector: publish what it gets, one row per visual token."""
    publish(FEATURES, args[0], lambda: args[0].detach().flatten(0, 1))
