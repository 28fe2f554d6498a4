"""Ask a selector which visual tokens of one call stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import GripError
from ..families.layouts import Layout, Scene
from .budgets import Budget
from .grouping import group_tokens, spread_taps
from .keepsets import VisualBatch, topk_mask

Score = Callable[[VisualBatch], Tensor | None]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a selector made of one call.

    Attributes:
        keep: [B, L] bool, the visual tokens that stay.
        embeds: [B, L, D] what stands in place of the kept tokens, or None if they stay as they are.
    """

    keep: Tensor
    embeds: Tensor | None = None


@torch.no_grad()
def choose(
    selector: Score,
    budget: Budget,
    per_image: bool,
    layout: Layout,
    scene: Scene,
    text: Tensor,
    taps: dict[str, Tensor],
) -> Choice | None:
    """Choose the visual tokens that stay.

    Args:
        selector: gives the scores; if it has a method `merge`, that gives new embeddings of the kept tokens.
        budget: how many stay.
        per_image: True if each image has its own budget, False if the images of a sample share it.
        layout: the family's map from a call to images and positions.
        scene: the call.
        text: [B, L] bool, the tokens that make up the question.
        taps: extra rows per visual token.

    Returns:
        The choice, or None if all visual tokens stay.

    Raises:
        GripError: The selector's scores have another shape or type than [groups, tokens] of floats.
        NonFiniteScoreError: A score is NaN or infinite.
    """
    visual = scene.visual
    image, positions = layout(scene)
    groups = group_tokens(visual, image if per_image else None)
    totals, rows = groups.mask.sum(1).tolist(), groups.row.tolist()
    wanted = budget.counts(totals, rows, len(visual))
    if wanted == totals:
        return None
    budgets = torch.tensor(wanted, device=visual.device)
    text_groups = group_tokens(text, None)
    texts = text_groups.pick(scene.embeds), text_groups.place, text_groups.mask
    words, word_index, word_mask = _per_row(*texts, text_groups.row, groups.row)
    batch = VisualBatch(
        tokens=groups.pick(scene.embeds),
        mask=groups.mask,
        text=words,
        text_mask=word_mask,
        budgets=budgets,
        positions=groups.pick(positions),
        image_index=groups.pick(image),
        taps={name: groups.pick(spread_taps(tap, visual, name)) for name, tap in taps.items()},
        text_index=word_index,
    )
    scores = selector(batch)
    if scores is None and getattr(selector, "inside", False):
        return None  # the selector drops tokens elsewhere
    if not isinstance(scores, Tensor) or scores.shape != groups.mask.shape or not scores.is_floating_point():
        got = f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise GripError(f"the selector must return float scores of shape {tuple(groups.mask.shape)}, got {got}")
    keep = topk_mask(scores.float(), groups.mask, budgets)
    merge = getattr(selector, "merge", None)
    embeds = None if merge is None else groups.place_values(merge(batch, keep), scene.embeds)
    return Choice(groups.scatter(keep, visual), embeds)


def _per_row(
    values: Tensor, place: Tensor, mask: Tensor, rows: Tensor, wanted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Text of the sample of each group: `values` [R, T, D], `place` and `mask` [R, T] are those of `rows` [R]."""
    match = wanted[:, None] == rows[None]
    if not match.numel():  # no sample has text
        none = mask.new_zeros(len(wanted), 0)
        return values.new_zeros(len(wanted), 0, values.shape[-1]), none.long(), none
    own = match.byte().argmax(1)
    found = match.any(1)
    return values[own] * found[:, None, None], place[own] * found[:, None], mask[own] & found[:, None]
