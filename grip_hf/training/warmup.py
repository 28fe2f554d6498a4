"""Supervised warm-up: keep the visual tokens that matter most for the frozen model's own answer.

For each example and a budget drawn at random the target is a keep-set: the most important tokens, or important tokens
that differ from each other, whichever the frozen model answers better with. Importance alone leaves whole objects out
when all of them matter a little, as in counting. Beside the keep-set, the scores are to follow the importance itself,
which says something of every token and not only on which side of one budget it lies.
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
from .checks import check_settings
from .importance import IMPORTANCES, shares, spread_out
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


def share_loss(scores: Tensor, mask: Tensor, importance: Tensor) -> Tensor:
    """Cross-entropy between the softmax of the scores and the shares of importance.

    It is ListNet's loss for the first pick (Cao et al., "Learning to Rank: From Pairwise Approach to Listwise
    Approach", ICML 2007).

    Args:
        scores: [G, N] float.
        mask: [G, N] bool, True at real tokens.
        importance: [G, N] float >= 0, 0 at padding.

    Returns:
        A scalar.
    """
    logs = scores.masked_fill(~mask, -torch.inf).log_softmax(1).masked_fill(~mask, 0)
    return -(shares(importance) * logs).sum(1).mean()


class WarmupTrainer(StoreTrainer):
    """Trains a scorer on importance targets.

    Args:
        *args: See `StoreTrainer`.
        target: Name of the importance: "combined", "gradient" or "attention".
        share_weight: Weight of `share_loss` beside `ranking_loss`.
        **kwargs: See `StoreTrainer`.

    Raises:
        ConfigError: The target is unknown, or the weight is no number >= 0.
    """

    def __init__(self, *args: Any, target: str = "combined", share_weight: float = 1.0, **kwargs: Any) -> None:
        if target not in IMPORTANCES:
            raise ConfigError(f"target must be one of {sorted(IMPORTANCES)}, got {target!r}")
        check_settings({"share_weight": share_weight})
        super().__init__(*args, **kwargs)
        self.target, self.share_weight = target, share_weight
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

    def targets(self, rows: list[int], batch: VisualBatch, importance: Tensor) -> Tensor:
        """[B, N] bool: the keep-set that each row of a batch should learn, from its `importance` [B, N]."""
        samples = self.store.samples(rows)
        top = topk_mask(importance, batch.mask, batch.budgets)
        spread = spread_out(batch.tokens, batch.mask, importance, batch.budgets)
        top_kl, spread_kl = (self.store.judge(samples, cut(kept, samples)).kl for kept in (top, spread))
        better = spread_kl < top_kl
        self.report(spread=float(better.float().mean()))
        return torch.where(better[:, None], spread, top)

    def loss(self, scorer: nn.Module, rows: list[int]) -> Tensor:
        """The loss of a batch of rows: of their keep-sets, and of the importance itself."""
        batch = self.store.visual(rows, self.draw_budgets(rows))
        scores, importance = score_groups(scorer, batch), self.importance(rows)
        kept = self.targets(rows, batch, importance)
        return ranking_loss(scores, batch.mask, kept) + self.share_weight * share_loss(scores, batch.mask, importance)


def cut(kept: Tensor, samples: Sequence[Sample]) -> list[Tensor]:
    """Keep-sets [B, N] without their padding: [N] each."""
    return [row[: sample.num_visual] for row, sample in zip(kept, samples, strict=True)]
