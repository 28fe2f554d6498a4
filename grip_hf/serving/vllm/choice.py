"""Which rows of encoded pictures stay: a selector's choice, from the batch that `apply_grip` would show it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from ...engine.choice import Score
from ...engine.keepsets import VisualBatch, group_tokens, topk_mask
from ...families.layouts import View
from ...families.table import Family
from .positions import embedded_span


@dataclasses.dataclass(frozen=True)
class Picture:
    """One encoded picture and what was asked about it.

    Attributes:
        content: [R] long, the tokens that stand for it in the unpruned prompt.
        visual: [R] bool, which of them are visual tokens.
        text: [T] long, the tokens of the prompt that are no visual ones; none if the selector does not read them.
        features: [N, D or more] what the encoder made of it.
        places: [S, A] long, how far each token of its embedded span lies behind the first, per axis of positions.
        kept: how many visual tokens stay.
    """

    content: Tensor
    visual: Tensor
    text: Tensor
    features: Tensor
    places: Tensor
    kept: int


def embed(picture: Picture, table: Any, width: int) -> Tensor:
    """[T + R, width or more] what the language model would see of the question and of the picture."""
    ids = torch.cat([picture.text, picture.content.masked_fill(picture.visual, 0)]).to(picture.features.device)
    words = table(ids).to(picture.features.dtype)
    rows = words.new_zeros(len(ids), max(width, picture.features.shape[1]))
    rows[:, :width] = words
    rows[len(picture.text) :][picture.visual.to(rows.device)] = picture.features
    return rows


@torch.no_grad()
def choose_rows(
    pictures: list[Picture], embedded: list[Tensor], selector: Score, family: Family, base: Any, width: int
) -> list[Tensor]:
    """Choose the tokens of several pictures at once.

    Args:
        pictures: the pictures.
        embedded: what `embed` gave for each.
        selector: scores visual tokens.
        family: the facts of the model's family.
        base: the model; has `config`, and what the family's layout reads of it.
        width: of the language model.

    Returns:
        For each picture [R] bool, what stays of its content: all that is not visual, and `kept` visual tokens.

    Raises:
        NonFiniteScoreError: A score is NaN or infinite.
    """
    device = embedded[0].device
    lengths = torch.tensor([len(one.text) for one in pictures], device=device)
    visual = _stack([pad(one.visual, (len(one.text), 0)) for one in pictures], 0).to(device)
    ids = _stack([torch.cat([one.text, one.content]) for one in pictures], -1).to(device)
    embeds = _stack([rows[:, :width] for rows in embedded], 0)
    view = View(visual, ids, embeds, _axes(pictures, visual), base, family.tile(base.config))
    image, positions = family.layout(view)
    groups = group_tokens(visual)
    words = embeds[:, : int(lengths.max())]
    text_mask = torch.arange(words.shape[1], device=device) < lengths[:, None]
    batch = VisualBatch(
        tokens=groups.pick(embeds),
        mask=groups.mask,
        text=words.masked_fill(~text_mask[..., None], 0),
        text_mask=text_mask,
        budgets=torch.tensor([one.kept for one in pictures], device=device),
        positions=groups.pick(positions),
        image_index=groups.pick(image),
    )
    scores = selector(batch)
    assert scores is not None  # None is for selectors that drop tokens elsewhere, which are not served
    stays = ~visual | groups.scatter(topk_mask(scores.float(), groups.mask, batch.budgets), visual)
    return [row[len(one.text) : len(one.text) + len(one.content)] for row, one in zip(stays, pictures, strict=True)]


def _stack(rows: list[Tensor], fill: int) -> Tensor:
    """[B, L, ...] of rows of different lengths."""
    return pad_sequence(rows, batch_first=True, padding_value=fill)


def _axes(pictures: list[Picture], visual: Tensor) -> Tensor | None:
    """[A, B, L] positions of visual tokens, as far as layouts read them, or None if they have one axis."""
    axes = pictures[0].places.shape[1]
    if axes == 1:
        return None
    positions = visual.new_zeros(axes, *visual.shape, dtype=torch.long)
    for row, one in enumerate(pictures):
        start, stop = embedded_span(one.content, one.visual)
        positions[:, row, len(one.text) + start : len(one.text) + stop] = one.places.T.to(visual.device)
    return positions
