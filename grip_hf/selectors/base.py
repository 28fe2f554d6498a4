"""What a selector is: something that scores the visual tokens of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..engine.keepsets import VisualBatch

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel


class Selector(ABC):
    """Scores visual tokens; the best ones within the budget are kept.

    A subclass writes `__call__`. It must be deterministic, and the scores of a group must not depend on padding or on
    the other groups of the batch. Arguments of `__init__` are the `selector_kwargs` of a `GripConfig`.

    Attributes:
        name: Name in the registry.
        needs: Names of the taps that `prepare` arranges and `__call__` reads from `batch.taps`. A name stands for one
            feature of one layer, so that two selectors that need it may share it.
        seed: For selectors that draw at random.
        inside: True if the selector drops tokens within the language model and may return None here.
    """

    name: ClassVar[str] = ""
    needs: tuple[str, ...] = ()
    seed: int = 0
    inside: ClassVar[bool] = False

    def prepare(self, model: PreTrainedModel) -> list[RemovableHandle]:
        """Get ready for a model; called once, when the patch is applied.

        Returns:
            The handles of the hooks that were registered, to be removed with the patch.

        Raises:
            UnsupportedModelError: The model cannot give what this selector needs.
        """
        return []

    @abstractmethod
    def __call__(self, batch: VisualBatch) -> Tensor:
        """Return scores [G, N] float32, higher = keep, finite at real tokens."""
