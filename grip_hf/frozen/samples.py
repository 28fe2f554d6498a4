"""What is known about one example, and batches of it. Tensors only; the model is in `features`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine.keepsets import VisualBatch
from .data import Example


@dataclasses.dataclass(eq=False)
class Encoded:
    """The pictures of an example as the vision tower and projector give them.

    Attributes:
        features: One tensor per picture, or one for all of them, as the family's `get_image_features` gives them.
        taps: Extra rows per visual token.
    """

    features: Any
    taps: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        return sum(tensor.nbytes for tensor in (*self.features, *self.taps.values()))


@dataclasses.dataclass(eq=False)
class Sample:
    """One example, ready for the model.

    Attributes:
        inputs: The processor's output for the prompt, a batch of one, without pixels.
        encoded: The encoded pictures.
        visual: What a selector sees of it: one row, without padding; its budget means nothing.
        answer: [A] long, the tokens of the reference answer, with the token that ends it.
        nbytes: Memory that the sample takes beside its pictures, `log_probs` included.
        log_probs: [A, V] float32, what the unpruned model predicts at these tokens; None until asked for.
        example: Where it came from.
    """

    inputs: dict[str, Tensor]
    encoded: Encoded
    visual: VisualBatch
    answer: Tensor
    nbytes: int
    example: Example
    log_probs: Tensor | None = None

    @property
    def num_visual(self) -> int:
        """Number of visual tokens."""
        return self.visual.mask.shape[1]


def answer_ids(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Answers of several samples aligned on the right: ids [B, Amax] long (0 where padded) and mask [B, Amax] bool."""
    longest = max(len(sample.answer) for sample in samples)
    ids = samples[0].answer.new_zeros(len(samples), longest)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, sample in enumerate(samples):
        ids[i, longest - len(sample.answer) :] = sample.answer
        mask[i, longest - len(sample.answer) :] = True
    return ids, mask


def stack_visual(rows: Sequence[VisualBatch], budgets: Tensor) -> VisualBatch:
    """Batch what selectors see of several samples, padded on the right; `budgets` [G] long."""

    def pad(values: list[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([value[0] for value in values], batch_first=True)

    fields = ("tokens", "mask", "text", "text_mask", "positions", "image_index")
    joined = {name: pad([getattr(row, name) for row in rows]) for name in fields}
    taps_ = {name: pad([row.taps[name] for row in rows]) for name in rows[0].taps}
    return VisualBatch(**joined, budgets=budgets.to(joined["mask"].device), taps=taps_)


def one_row(batch: VisualBatch, row: int) -> VisualBatch:
    """One row of a batch without its padding."""
    real, words = batch.mask[row], batch.text_mask[row]
    return VisualBatch(
        tokens=batch.tokens[row, real][None],
        mask=batch.mask[row, real][None],
        text=batch.text[row, words][None],
        text_mask=batch.text_mask[row, words][None],
        budgets=batch.budgets[row : row + 1],
        positions=batch.positions[row, real][None],
        image_index=batch.image_index[row, real][None],
        taps={name: tap[row, real][None] for name, tap in batch.taps.items()},
    )


def share_tokens(visual: VisualBatch, features: Any) -> VisualBatch:
    """Let a row's tokens be the encoded picture itself where they are equal: questions about it share memory."""
    whole: Tensor = features[0][None]
    same = len(features) == 1 and whole.shape == visual.tokens.shape and torch.equal(whole, visual.tokens)
    return dataclasses.replace(visual, tokens=whole) if same else visual
