"""Supervised warm-up: rank visual tokens by how much they matter for the frozen model's own answer.

The loss is the likelihood of picking the most important tokens first, under the same Plackett-Luce distribution that
GRPO samples from, for budgets drawn at random: so the scorer starts as a policy and learns that the budget matters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..selection import log_prob
from .importance import IMPORTANCES
from .policy import score
from .supervised import StoreTrainer


def ranking_loss(scores: Tensor, mask: Tensor, importance: Tensor, budgets: Tensor) -> Tensor:
    """Weighted negative log-likelihood of picking tokens by falling importance.

    Args:
        scores: [G, N] float.
        mask: [G, N] bool, True at real tokens.
        importance: [G, N] float >= 0.
        budgets: [G] long, how many picks count.

    Returns:
        A scalar: each pick's negative log-prob, weighted by its share of the importances' roots within the
        budget; roots keep the few tokens that matter most from drowning the many that matter together.
    """
    width = int(budgets.max())
    ranked = importance.masked_fill(~mask, -1).argsort(dim=1, descending=True, stable=True)[:, :width]
    counted = torch.arange(width, device=scores.device) < torch.minimum(budgets, mask.sum(1))[:, None]
    weight = importance.gather(1, ranked).clamp(min=0).sqrt().masked_fill(~counted, 0)
    weight = weight / weight.sum(1, keepdim=True).clamp(min=1e-12)
    return -(weight * log_prob(scores, mask, ranked.masked_fill(~counted, -1))).sum(1).mean()


class WarmupTrainer(StoreTrainer):
    """Trains a scorer on importance targets.

    Args:
        *args: See `StoreTrainer`.
        target: Name of the importance: "combined", "gradient" or "attention".
        **kwargs: See `StoreTrainer`.

    Raises:
        ConfigError: The target is unknown.
    """

    def __init__(self, *args: Any, target: str = "combined", **kwargs: Any) -> None:
        if target not in IMPORTANCES:
            raise ConfigError(f"target must be one of {sorted(IMPORTANCES)}, got {target!r}")
        super().__init__(*args, **kwargs)
        self.target = target
        self._known: dict[int, Tensor] = {}

    def importance(self, rows: list[int]) -> Tensor:
        """[B, N] targets of some rows, made once per row."""
        missing = [row for row in dict.fromkeys(rows) if row not in self._known]
        if missing:
            samples = self.store.samples(missing)
            values = IMPORTANCES[self.target](self.store.vlm, samples)
            for row, sample, value in zip(missing, samples, values, strict=True):
                self._known[row] = value[: sample.num_visual].half().cpu()
        found = [self._known[row].float() for row in rows]
        return nn.utils.rnn.pad_sequence(found, batch_first=True).to(self.store.vlm.device)

    def loss(self, scorer: nn.Module, rows: list[int]) -> Tensor:
        """The ranking loss of a batch of rows."""
        target = self.importance(rows)
        batch = self.store.visual(rows, self.draw_budgets(rows))
        return ranking_loss(score(scorer, batch), batch.mask, target, batch.budgets)
