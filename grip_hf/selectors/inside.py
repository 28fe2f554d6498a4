"""Selectors that drop visual tokens between layers of the language model, by its own attention.

They say where tokens go, how many are left, and whose attention tells which; `engine/layers.py` does it.
"""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from ..engine.context import running
from ..engine.keepsets import VisualBatch
from ..errors import GripError
from .base import Selector


class InsideSelector(Selector):
    """Drops tokens inside the language model. A subclass says where, and how many are left.

    The budget is what is left in the end; earlier layers see more, so that at equal budget these methods compute more
    than one that drops tokens before the language model. `kept_tokens` tells what the first layer has: all tokens.
    """

    inside = True

    @abstractmethod
    def stages(self, depth: int) -> list[tuple[int, int]]:
        """Per drop the layer whose attention ranks the tokens, and the first layer without the dropped ones.

        Args:
            depth: Number of layers. Where both are the same layer, its attention to what comes in ranks.
        """

    @abstractmethod
    def left(self, totals: Tensor, budgets: Tensor, stage: int, stages: int) -> Tensor:
        """Tokens [G] left of `totals` [G] after drop number `stage` of `stages`."""

    def asking(self, batch: VisualBatch) -> Tensor | None:
        """[G, T] bool: the words whose attention ranks; None, or no word: the prompt's last token."""
        return None

    def __call__(self, batch: VisualBatch) -> None:  # type: ignore[override]
        """Give no scores: all tokens enter the language model.

        Raises:
            GripError: No patched model is being called, so that nothing would drop any.
        """
        if running() is None:
            raise GripError(
                f"selector {self.name!r} drops tokens inside the language model: use it through apply_grip"
            )
