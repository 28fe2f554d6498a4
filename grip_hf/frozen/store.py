"""Examples by row number, with what the frozen model knows about them: looked up once, kept while there is room."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from cachetools import LRUCache
from torch import Tensor

from ..config import count_kept
from ..engine.keepsets import VisualBatch
from ..errors import DatasetError
from .data import Examples
from .samples import Sample, answer_ids, stack_visual
from .vlm import FrozenVLM


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How answers given with few tokens compare with those of the whole model; one entry per row.

    Attributes:
        kl: [B] KL(full || pruned) in nats, summed over the answer's positions.
        correct: [B] bool, the pruned model would write the reference answer, greedily and exactly.
        log_prob: [B] log-probability of the reference answer.
        predicted: [B, Amax] long, the likeliest token at each position; -1 where padded.
        confidence: [B] log-probability of these likeliest tokens together: how sure the pruned model is.
    """

    kl: Tensor
    correct: Tensor
    log_prob: Tensor
    predicted: Tensor
    confidence: Tensor


def compare(full: Tensor, pruned: Tensor, ids: Tensor, mask: Tensor) -> Verdict:
    """Compare predictions at the answer's positions.

    Args:
        full: [B, A, V] log-probabilities of the unpruned model.
        pruned: [B, A, V] log-probabilities of the pruned model.
        ids: [B, A] long, the reference answer.
        mask: [B, A] bool, True at real positions.

    Returns:
        The verdict; `kl` and `log_prob` carry gradients if `pruned` does.
    """
    kl = (full.exp() * (full - pruned)).sum(-1).masked_fill(~mask, 0).sum(-1)
    told = pruned.gather(2, ids[..., None]).squeeze(-1).masked_fill(~mask, 0).sum(-1)
    highest, best = pruned.max(-1)
    sure = highest.masked_fill(~mask, 0).sum(-1)
    return Verdict(kl.clamp(min=0), ((best == ids) | ~mask).all(-1), told, best.masked_fill(~mask, -1), sure)


class SampleStore:
    """Samples by row.

    Args:
        vlm: The frozen model.
        examples: The rows.
        cache_bytes: How much memory samples may take; pictures have a cache of their own.
        rows_at_once: Largest batch of pruned forward passes.
    """

    def __init__(
        self, vlm: FrozenVLM, examples: Examples, cache_bytes: int = 1 << 30, rows_at_once: int = 128
    ) -> None:
        self.vlm, self.examples, self.rows_at_once = vlm, examples, rows_at_once
        self._cache: LRUCache[int, Sample] = LRUCache(cache_bytes, getsizeof=lambda one: one.nbytes)

    def samples(self, rows: Sequence[int]) -> list[Sample]:
        """The samples of some rows, in their order; a row may come several times."""
        found = {row: self._cache.get(row) for row in rows}
        missing = [row for row, sample in found.items() if sample is None]
        if missing:
            try:
                fresh = self.vlm.prepare([self.examples[row] for row in missing])
            except DatasetError as error:
                raise DatasetError(f"among the questions {missing}: {error}") from error
            for row, one in zip(missing, fresh, strict=True):
                found[row] = one
                if one.nbytes <= self._cache.maxsize:
                    self._cache[row] = one
        return [sample for row in rows if (sample := found[row]) is not None]

    def visual(self, rows: Sequence[int], budgets: Tensor) -> VisualBatch:
        """What a selector sees of some rows under `budgets` [G] long."""
        return stack_visual([sample.visual for sample in self.samples(rows)], budgets)

    def count(self, row: int, keep_ratio: float) -> int:
        """Number of visual tokens that a row keeps under a ratio."""
        return count_kept(self.samples([row])[0].num_visual, keep_ratio)

    @torch.no_grad()
    def judge(self, samples: Sequence[Sample], keep: Sequence[Tensor]) -> Verdict:
        """Answer every sample with its kept tokens ([N] bool each) and compare with the unpruned model."""
        ids, mask = answer_ids(samples)
        full = self.vlm.full_log_probs(samples)
        pruned = torch.zeros_like(full)
        for rows in similar_lengths([int(kept.sum()) for kept in keep], self.rows_at_once):
            logits = self.vlm.run([samples[row] for row in rows], [keep[row] for row in rows]).logits
            pruned[rows, pruned.shape[1] - logits.shape[1] :] = logits.float().log_softmax(-1)
        return compare(full, pruned, ids, mask)


def similar_lengths(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Split rows into batches of at most `most` whose lengths differ less than twofold: padding costs time."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not batches or len(batches[-1]) == most or lengths[row] >= 2 * lengths[batches[-1][0]]:
            batches.append([])
        batches[-1].append(row)
    return batches
