"""How sure a model is of what it writes, and whether it is right as often as it is sure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

BINS = 15


def confidences(written: Tensor, logits: Sequence[Tensor], ends: Collection[int]) -> list[float]:
    """The probability of each text: the product of its tokens', with the one that ends it.

    Args:
        written: [B, A] long, what greedy decoding wrote; what stands behind the first end is not looked at.
        logits: Per step [B, V] what each token was taken from.
        ends: Tokens that end a text.
    """
    logs = torch.stack([one.float().log_softmax(-1) for one in logits], 1)
    told = logs.gather(2, written[:, : logs.shape[1], None]).squeeze(-1)
    ended = torch.isin(written, torch.tensor(sorted(ends), dtype=written.dtype, device=written.device)).long()
    behind = (ended.cumsum(1) - ended)[:, : logs.shape[1]] > 0
    return [float(one) for one in told.masked_fill(behind, 0).sum(1).exp()]


def calibration_error(confidence: Sequence[float], scores: Sequence[float], bins: int = BINS) -> float:
    """Expected calibration error (Guo et al., ICML 2017, arXiv 1706.04599).

    Answers are put into `bins` intervals (low, high] of equal width by their confidence; the distance between mean
    confidence and mean score is averaged over intervals, weighted by how many answers they hold.

    Args:
        confidence: In [0, 1].
        scores: How right each answer is, in [0, 1].
        bins: Intervals.

    Raises:
        ValueError: There are no answers, or not as many scores.
    """
    if not confidence or len(confidence) != len(scores):
        raise ValueError(f"{len(confidence)} confidences and {len(scores)} scores have no calibration error")
    sure, right = (torch.tensor(list(values), dtype=torch.float64) for values in (confidence, scores))
    index = (sure * bins).ceil().long().sub(1).clamp(0, bins - 1)
    apart = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, sure - right)
    return float(apart.abs().sum() / len(sure))
