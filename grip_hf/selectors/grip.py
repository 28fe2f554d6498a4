"""GRIP: the learned scorer as a selector."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..engine.keepsets import VisualBatch
from ..errors import ScorerError
from ..scorer.memory import as_scores, pick_in_turn
from ..scorer.model import GripScorer
from . import register
from .base import Selector

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel


@register("grip")
class GripSelector(Selector):
    """Scores by a `GripScorer` that knows the tokens, the question and the budget.

    Args:
        scorer: The scorer, or the folder or Hub repository to load it from.
    """

    def __init__(self, scorer: GripScorer | str | os.PathLike[str]) -> None:
        if isinstance(scorer, (str, os.PathLike)):
            scorer = GripScorer.from_pretrained(scorer)
        if not isinstance(scorer, GripScorer):
            raise ScorerError(f"scorer must be a GripScorer or where to load one from, got {type(scorer).__name__}")
        self.scorer = scorer

    def prepare(self, model: PreTrainedModel) -> list[RemovableHandle]:
        """Check that the scorer fits the model, and move it to the model's device.

        Raises:
            ScorerError: The scorer is made for embeddings of another width.
        """
        weight: Any = model.get_input_embeddings().weight
        width = model.config.get_text_config().hidden_size
        if width != self.scorer.config.hidden_size:
            raise ScorerError(
                f"this scorer is made for hidden_size {self.scorer.config.hidden_size}, "
                f"{type(model).__name__} has {width}"
            )
        if weight.device.type != "meta":
            self.scorer.to(weight.device)
        return []

    @torch.no_grad()
    def __call__(self, batch: VisualBatch) -> Tensor:
        """Return the scorer's scores [G, N]; one with memory picks, and its scores tell the order."""
        seen = (batch.tokens, batch.mask, batch.text, batch.text_mask, batch.keep_ratio, batch.positions)
        if not self.scorer.config.memory_width:
            return self.scorer(*seen)
        return as_scores(*pick_in_turn(self.scorer.rate(*seen), batch.mask, batch.budgets), batch.mask)
