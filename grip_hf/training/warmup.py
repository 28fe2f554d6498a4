"""Supervised warm-up: keep the visual tokens that matter most for the frozen model's own answer.

For each example and a budget drawn at random the target is a keep-set: the most important tokens, or important tokens
that differ from each other, whichever the frozen model answers better with. Importance alone leaves whole objects out
when all of them matter a little, as in counting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.keepsets import VisualBatch, topk_mask
from ..errors import ConfigError
from ..frozen.samples import Sample
from .importance import IMPORTANCES, spread_out
from .policy import score_groups
from .supervised import StoreTrainer


def ranking_loss(scores: Tensor, mask: Tensor, kept: Tensor) -> Tensor:
    """Mean negative log-probability that a token to keep is ranked above all that are to be dropped.

    The order within the keep-set is left free: no answer depends on it.

    Args:
        scores: [G, N] float.
        mask: [G, N] bool, True at real tokens.
        kept: [G, N] bool, the target, at least one token per row.

    Returns:
        A scalar, 0 where nothing is dropped.
    """
    dropped = scores.masked_fill(kept | ~mask, -torch.inf).logsumexp(1, keepdim=True)
    return (F.softplus(dropped - scores).masked_fill(~kept, 0).sum(1) / kept.sum(1)).mean()


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

    def targets(self, rows: list[int], batch: VisualBatch) -> Tensor:
        """[B, N] bool: the keep-set that each row of a batch should learn."""
        importance, samples = self.importance(rows), self.store.samples(rows)
        top = topk_mask(importance, batch.mask, batch.budgets)
        spread = spread_out(batch.tokens, batch.mask, importance, batch.budgets)
        top_kl, spread_kl = (self.store.judge(samples, cut(kept, samples)).kl for kept in (top, spread))
        better = spread_kl < top_kl
        self.report(spread=float(better.float().mean()))
        return torch.where(better[:, None], spread, top)

    def loss(self, scorer: nn.Module, rows: list[int]) -> Tensor:
        """The ranking loss of a batch of rows."""
        batch = self.store.visual(rows, self.draw_budgets(rows))
        return ranking_loss(score_groups(scorer, batch), batch.mask, self.targets(rows, batch))


def cut(kept: Tensor, samples: Sequence[Sample]) -> list[Tensor]:
    """Keep-sets [B, N] without their padding: [N] each."""
    return [row[: sample.num_visual] for row, sample in zip(kept, samples, strict=True)]
