"""Which rows of encoded pictures stay: the selector's choice, made exactly as in a patched transformers model."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...engine.budgets import Budget
from ...engine.choice import Score, choose
from ...families.layouts import Scene
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
    """
    device = embedded[0].device
    lengths = [len(one.text) for one in pictures]
    visual = _stack([torch.nn.functional.pad(one.visual, (len(one.text), 0)) for one in pictures], 0).to(device)
    scene = Scene(
        visual,
        _stack([torch.cat([one.text, one.content]) for one in pictures], -1).to(device),
        _stack([rows[:, :width] for rows in embedded], 0),
        _axes(pictures, visual),
        base,
        family.tile(base.config),
    )
    text = torch.arange(visual.shape[1], device=device) < torch.tensor(lengths, device=device)[:, None]
    budget = Budget(num_tokens=tuple(one.kept for one in pictures))
    choice = choose(selector, budget, False, family.layout, scene, text, {})
    stays = torch.ones_like(visual) if choice is None else ~visual | choice.keep
    return [row[start : start + len(one.content)] for row, start, one in zip(stays, lengths, pictures, strict=True)]


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
