"""Selectors that drop visual tokens between layers of the language model, by its own attention.

They say where tokens go, how many are left, and whose attention tells which; `engine/layers.py` does it.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..engine.context import running
from ..engine.keepsets import VisualBatch
from ..errors import GripError
from .base import Selector

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

EARLIEST = 2  # number of the first layer that may lack tokens, counted from 0


def layer_at(share: float, depth: int) -> int:
    """The layer at a share of a model's `depth` layers, but no earlier than the third.

    The papers give numbers of layers of a model of 32. The same share is taken of others; in models of few layers it
    would rank in the first one, where words have not looked at each other yet.
    """
    return max(EARLIEST, int(share * depth))


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

    def held(self, total: int, budget: int, depth: int) -> list[int]:
        """How many of a group's `total` visual tokens each of `depth` layers sees under a budget."""
        stages, found = self.stages(depth), [total] * depth
        for number, (_, drop) in enumerate(stages):
            left = self.left(torch.tensor([total]), torch.tensor([budget]), number, len(stages))
            found[drop:] = [int(left)] * (depth - drop)
        return found

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


class AtDepth(InsideSelector):
    """Another selector, dropping at the shares of layers where it does in a model of `depth` layers.

    So what was measured on a shallow model can be timed on a deep one.

    Args:
        selector: The selector.
        depth: Layers of the other model.
    """

    def __init__(self, selector: InsideSelector, depth: int) -> None:
        self.selector, self.depth, self.needs, self.seed = selector, depth, selector.needs, selector.seed

    @property
    def name(self) -> str:  # type: ignore[override]
        """The other's name."""
        return self.selector.name

    def prepare(self, model: PreTrainedModel) -> list[RemovableHandle]:
        """As the other does."""
        return self.selector.prepare(model)

    def stages(self, depth: int) -> list[tuple[int, int]]:
        """The other's drops, moved to the same shares of `depth` layers; what ranks stands as far before them."""
        found = {}
        for rank, drop in self.selector.stages(self.depth):
            here = round(drop * depth / self.depth)
            found[here] = (here - (drop - rank), here)
        return list(found.values())

    def left(self, totals: Tensor, budgets: Tensor, stage: int, stages: int) -> Tensor:
        """As the other says."""
        return self.selector.left(totals, budgets, stage, stages)

    def asking(self, batch: VisualBatch) -> Tensor | None:
        """As the other says."""
        return self.selector.asking(batch)
