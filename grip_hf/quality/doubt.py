"""How sure a model is of what it writes: the probability that it gives its own greedy answer.

The product of the greedy tokens' probabilities falls with every token, so that an answer is in doubt for good as soon
as it is below a threshold; nothing more of it is then written.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from ..errors import GripError, UnsupportedModelError

ANSWER, FIRST = "answer", "first"
RULES = (ANSWER, FIRST)


class Doubt(LogitsProcessor):
    """Watches what greedy decoding is sure of, as the last of `generate`'s logits processors; changes nothing.

    Args:
        rule: "answer": the product over the whole answer; "first": the first token alone, known after the prefill.
        threshold: The least confidence of an answer that is not in doubt; None doubts none.
        whole: Gives, per row, whether all of its visual tokens were kept, so that it is not in doubt; asked after the
            first token.
    """

    def __init__(self, rule: str, threshold: float | None, whole: Callable[[], list[bool]] = list) -> None:
        self.rule, self.whole = rule, whole
        self.limit = None if threshold is None else math.log(threshold) if threshold > 0 else -math.inf
        self.steps: list[Tensor] = []
        self._sum: Tensor | None = None
        self._safe: Tensor | None = None

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
        """Remember the log-probability of the token that greedy decoding takes."""
        step = scores.float().log_softmax(-1).amax(-1)
        self.steps.append(step)
        if self._sum is None:
            self._sum = step
        elif self.rule == ANSWER:
            self._sum = self._sum + step
        return scores

    def unsure(self) -> Tensor:
        """[B] bool: which rows are in doubt after the tokens so far, counted on where they have ended.

        Raises:
            UnsupportedModelError: `generate` of this model did not let it watch (Janus drops all logits processors).
        """
        if self._sum is None:
            raise UnsupportedModelError(
                "a quality needs logits_processor=..., which generate of this model does not heed: use keep_ratio or "
                "num_tokens"
            )
        if self.limit is None:
            return torch.zeros_like(self._sum, dtype=torch.bool)
        if self._safe is None:
            safe = self.whole() or [False] * len(self._sum)
            self._safe = torch.tensor(safe, device=self._sum.device)
        return ~(self._sum >= self.limit) & ~self._safe

    def log_probs(self, lengths: list[int], rule: str | None = None) -> list[float]:
        """Per row the logarithm of its confidence, with so many tokens written, by another rule if one is given.

        Raises:
            GripError: A probability is NaN.
        """
        steps = torch.stack(self.steps).double().cpu()  # [steps, B]
        counts = [1 if (rule or self.rule) == FIRST else length for length in lengths]
        found = [float(steps[:count, row].sum()) for row, count in enumerate(counts)]
        if any(math.isnan(one) for one in found):
            bad = [row for row, one in enumerate(found) if math.isnan(one)]
            raise GripError(f"the model's probabilities are NaN in rows {bad}: nothing can be promised of its answers")
        return found


class Enough(StoppingCriteria):
    """Ends the rows that are in doubt: they are answered again, and nothing more of this answer is needed."""

    def __init__(self, doubt: Doubt) -> None:
        self.doubt = doubt

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """[B] bool: which rows are in doubt."""
        return self.doubt.unsure().to(input_ids.device)


def lengths(tokens: Tensor, ends: list[int], pad: int | None) -> list[int]:
    """How many tokens of each row are its own.

    Args:
        tokens: [B, A] long, what was written.
        ends: Ids of the tokens that end an answer, which belong to it.
        pad: Id of what stands behind an answer that ended otherwise; None if nothing is put there.
    """
    found = []
    for row in tokens.tolist():
        end = next((place for place, token in enumerate(row) if token in ends), None)
        if end is not None:
            found.append(end + 1)
            continue
        length = len(row)
        while ends and pad is not None and length > 1 and row[length - 1] == pad:
            length -= 1
        found.append(length)
    return found
