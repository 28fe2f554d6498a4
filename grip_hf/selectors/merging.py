"""Selectors that fold dropped tokens into kept ones."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..engine.keepsets import VisualBatch
from ..errors import UnsupportedModelError
from ..families.table import find_parts
from .base import Selector
from .taps import FEATURES, Layer, tap_features, tap_name, tap_vision

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel


class MergingSelector(Selector):
    """Chooses by the vision tower's attention, and merges features before the projector, as the papers do.

    A subclass writes `__call__` and `merge_features`.

    Attributes:
        attended: Names of the features of attention that it reads (see `Attended`).
        layer: Their layer.
    """

    attended: ClassVar[tuple[str, ...]]
    layer: ClassVar[Layer] = None

    def __init_subclass__(cls) -> None:
        """Name what the subclass needs."""
        cls.needs = (*(tap_name(feature, cls.layer) for feature in cls.attended), FEATURES)

    def __init__(self) -> None:
        self._projector: Any = None

    def prepare(self, model: PreTrainedModel) -> list[RemovableHandle]:
        """Tap attention, keys and features; raises `UnsupportedModelError` if the tower cannot give them."""
        base: Any = find_parts(model).base
        attention, features = tap_vision(model, self.name, self.attended, self.layer), tap_features(model)
        if not features:
            for handle in attention:
                handle.remove()
            raise UnsupportedModelError(
                f"selector {self.name!r} merges what the projector gets, which needs one visual token per patch; "
                f"{type(model).__name__} makes one of several"
            )
        self._projector = base.multi_modal_projector
        return [*attention, *features]

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
