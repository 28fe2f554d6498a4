"""Train a tower scorer: rows of the vision tower to keep, taught by the scorer of the visual tokens, then by reward.

The machinery is that of every scorer. What it sees are the tower's rows instead of the visual tokens they become; a
keep-set is judged by encoding the picture with these rows alone and letting the scorer prune what is left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from cachetools import LRUCache
from torch import Tensor, nn

from ..engine.keepsets import VisualBatch, topk_mask
from ..frozen.samples import Sample, answer_ids
from ..frozen.store import SampleStore, Verdict, compare
from ..frozen.vlm import FrozenVLM
from ..patch import apply_grip
from ..scorer.model import GripScorer
from ..selectors import get_selector
from ..tower.layout import TAP
from .policy import score_groups
from .supervised import StoreTrainer
from .warmup import ranking_loss

PIXELS = "pixel_values"


class TowerStore(SampleStore):
    """Samples whose tokens, for whoever scores, are rows of the vision tower.

    Args:
        vlm: The frozen model, tapped by `RowsTap`.
        examples: The rows.
        scorer: Prunes the visual tokens that are left.
        keep_ratio: To which share of all visual tokens.
        depth: After how many layers rows leave.
        pixel_bytes: How much memory pictures may take.
        **kwargs: Further arguments of `SampleStore`.
    """

    def __init__(
        self,
        vlm: FrozenVLM,
        examples: Any,
        scorer: GripScorer,
        keep_ratio: float = 0.11,
        depth: float | None = None,
        pixel_bytes: int = 1 << 29,
        **kwargs: Any,
    ) -> None:
        super().__init__(vlm, examples, **kwargs)
        self.selector = get_selector("grip", scorer=scorer)
        self.keep_ratio, self.depth = keep_ratio, depth
        self._pixels: LRUCache[int, dict[str, Tensor]] = LRUCache(
            pixel_bytes, getsizeof=lambda one: sum(value.nbytes for value in one.values())
        )
        self._keep: Tensor | None = None

    def boundary(self, rows: Sequence[int], budgets: Tensor) -> VisualBatch:
        """What a selector of visual tokens sees."""
        return super().visual(rows, budgets)

    def visual(self, rows: Sequence[int], budgets: Tensor) -> VisualBatch:
        """What a tower scorer sees of some rows under `budgets` [G] long, counted in groups of rows."""
        batch = super().visual(rows, budgets)
        return dataclasses.replace(batch, tokens=batch.taps[TAP])

    @torch.no_grad()
    def judge(self, samples: Sequence[Sample], keep: Sequence[Tensor]) -> Verdict:
        """Answer every sample with the kept rows ([N] bool each), pruned further, and compare with the whole model."""
        ids, mask = answer_ids(samples)
        full = self.vlm.full_log_probs(samples)
        pruned = torch.zeros_like(full)
        try:
            for rows in same(keep, self.rows_at_once):
                logits = self._run([samples[row] for row in rows], torch.stack([keep[row] for row in rows]))
                pruned[rows, pruned.shape[1] - logits.shape[1] :] = logits.float().log_softmax(-1)
        finally:
            self.vlm.attach()
        return compare(full, pruned, ids, mask)

    def _run(self, samples: Sequence[Sample], keep: Tensor) -> Tensor:
        """Logits [B, A, V] that predict the answers of samples that keep as many rows each: [B, N] bool."""
        vlm = self.vlm
        batch = vlm.collate([one.inputs for one in samples], [one.answer for one in samples])
        prompt = batch["attention_mask"].clone()
        for row, one in zip(prompt, samples, strict=True):
            row[len(row) - len(one.answer) :] = 0
        shown = [self._look(one) for one in samples]
        pictures = {name: torch.cat([one[name] for one in shown]) for name in shown[0]}
        share = int(keep[0].sum()) / keep.shape[1]
        self._keep = keep.to(vlm.device)
        model: Any = apply_grip(
            vlm.model, keep_ratio=min(self.keep_ratio, share), selector=self.selector,
            tower_keep_ratio=share, tower_depth=self.depth, tower_selector=self._given,
        )  # fmt: skip
        longest = max(len(one.answer) for one in samples)
        with model.grip.prompt(prompt):
            output = model(**batch, **pictures, use_cache=False, logits_to_keep=longest + 1)
        return output.logits[:, :-1]

    def _given(self, batch: VisualBatch) -> Tensor:
        assert self._keep is not None
        return self._keep.reshape(batch.mask.shape).float()

    def _look(self, sample: Sample) -> dict[str, Tensor]:
        """The picture arguments of a sample."""
        found = self._pixels.get(id(sample.example))
        if found is None:
            given = self.vlm.process(sample.example)
            found = {name: value for name, value in given.items() if name not in sample.inputs or name == PIXELS}
            found = {
                name: value.to(self.vlm.model.dtype) if value.is_floating_point() else value
                for name, value in found.items()
            }
            self._pixels[id(sample.example)] = found
        return found


def same(keep: Sequence[Tensor], most: int) -> list[list[int]]:
    """Rows that keep as many of as many, in batches of at most `most`."""
    batches: dict[tuple[int, int], list[list[int]]] = {}
    for row, kept in enumerate(keep):
        several = batches.setdefault((len(kept), int(kept.sum())), [[]])
        if len(several[-1]) == most:
            several.append([])
        several[-1].append(row)
    return [one for several in batches.values() for one in several]


class TowerWarmupTrainer(StoreTrainer):
    """Teaches a tower scorer to keep the rows whose visual tokens the scorer would keep.

    Args:
        *args: See `StoreTrainer`; the store is a `TowerStore`.
        teacher: Scores the visual tokens; None takes the store's scorer.
        **kwargs: See `StoreTrainer`.
    """

    def __init__(self, *args: Any, teacher: Callable[[VisualBatch], Tensor] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        store: Any = self.store
        self.teacher = teacher or store.selector

    def loss(self, scorer: nn.Module, rows: list[int]) -> Tensor:
        """The ranking loss of a batch of rows."""
        store: Any = self.store
        budgets = self.draw_budgets(rows)
        seen, batch = store.boundary(rows, budgets), store.visual(rows, budgets)
        kept = topk_mask(self.teacher(seen), seen.mask, seen.budgets)
        return ranking_loss(score_groups(scorer, batch), batch.mask, kept)
