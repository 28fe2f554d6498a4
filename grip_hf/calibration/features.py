"""What may tell doubt beside the probability of an answer: for experiments with other senses of doubt."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.call import LastCall
from ..frozen.samples import Sample
from ..quality.doubt import ANSWER, Doubt

Array = np.ndarray[Any, Any]
NAMES = (
    "log p of the answer", "log p of the first token", "lowest log p of a token", "entropy of the first token",
    "margin of the first token", "mean entropy", "length", "share kept", "score of the last kept token",
    "score of the first dropped one", "spread of the scores",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of answers and of rows.

    Attributes:
        answers: [budgets, rows, features] float32, as `NAMES` says.
        rows_: [rows, features] float16: the means of the question's word embeddings and of the visual tokens.
    """

    answers: Array
    rows_: Array

    def rows(self, chosen: Array) -> Features:
        """Those of some rows."""
        return Features(self.answers[:, chosen], self.rows_[chosen])

    @classmethod
    def joined(cls, batches: Sequence[Mapping[str, Any]]) -> Features:
        """Those of several batches."""
        answers = np.concatenate([np.asarray(one["features"], dtype=np.float32) for one in batches], axis=1)
        return cls(answers, np.concatenate([one["samples"] for one in batches]))


class Details(Doubt):
    """Watches more than the greedy token's probability."""

    def __init__(self) -> None:
        super().__init__(ANSWER, None)
        self.more: list[Tensor] = []

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
        """Remember entropy and margin of the step."""
        logs = scores.float().log_softmax(-1)
        entropy = -(logs.exp() * logs.clamp(min=-1e4)).sum(-1)
        best = logs.topk(2).values
        self.more.append(torch.stack([entropy, best[:, 0] - best[:, 1].clamp(min=-1e4)], -1))
        return super().__call__(input_ids, scores)

    def of_answers(self, lengths: Sequence[int], last: LastCall) -> Array:
        """[rows, features] of the answers that were written."""
        steps, more = torch.stack(self.steps).cpu().numpy(), torch.stack(self.more).cpu().numpy()
        found = []
        for row, length in enumerate(lengths):
            own, kept, total = steps[:length, row], len(last.kept[row]), last.total[row]
            scores = None if last.scores is None or len(last.scores) != len(lengths) else last.scores[row].cpu()
            falling = np.zeros(total) if scores is None else np.sort(scores.numpy()[:total])[::-1]
            edge = (falling[kept - 1], falling[min(kept, total - 1)], falling.std()) if total else (0, 0, 0)
            first, mean = more[0, row], more[:length, row, 0].mean()
            found.append([own.sum(), own[0], own.min(), first[0], first[1], mean, length, kept / max(total, 1), *edge])
        return np.array(found, dtype=np.float32)


def of_rows(samples: Sequence[Sample]) -> Array:
    """[rows, features] float16: the mean of the question's word embeddings, and of all visual tokens."""
    rows = [torch.cat([one.visual.text[0].mean(0), one.visual.tokens[0].mean(0)]) for one in samples]
    return torch.stack(rows).to("cpu", torch.float16).numpy()
