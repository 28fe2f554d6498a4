"""How each kind of family lays out its visual tokens: which image each belongs to, and where in it.

A layout takes a `View`, one call of the language model before pruning, and gives `image` [B, L] long and `positions`
[B, L, 2] float, (row, column) of the token's centre in [0, 1]; for families that cut an image into tiles, within the
tile. It reads nothing but what every call has, because `generate` encodes pictures beforehand and does not pass on
their sizes. Pure tensor functions; values at positions that are not visual are meaningless.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class View:
    """One call as a layout sees it.

    Attributes:
        visual: [B, L] bool, the visual tokens.
        input_ids: [B, L] long, or None if the caller gave embeddings.
        embeds: [B, L, D] what enters the language model.
        position_ids: as given to the language model, last dims [B or 1, L], or None.
        base: the multimodal base model.
        tile: number of tokens of one picture, or of one tile of it, where the family fixes it; else 0.
    """

    visual: Tensor
    input_ids: Tensor | None
    embeds: Tensor
    position_ids: Tensor | None
    base: nn.Module
    tile: int

    @property
    def config(self) -> Any:
        """The config of the base model."""
        return self.base.config

    def before(self) -> Tensor:
        """[B, L] long: the token id before each position, -1 where it is not known."""
        ids = torch.full_like(self.visual, -1, dtype=torch.long) if self.input_ids is None else self.input_ids
        return torch.nn.functional.pad(ids.to(self.visual.device), (1, -1), value=-1)


Layout = Callable[[View], tuple[Tensor, Tensor]]


def fixed_grid(view: View) -> tuple[Tensor, Tensor]:
    """Every picture has the same number of tokens, a square and perhaps a leading [CLS]."""
    order = ordinals(view.visual)
    return order.div(view.tile, rounding_mode="floor"), grid_positions(order % view.tile, view.tile)


def frames(view: View) -> tuple[Tensor, Tensor]:
    """Pictures as in `fixed_grid`; every frame of a video has a [CLS] token besides (Video-LLaVA)."""
    video = view.visual & (view.input_ids == view.config.video_token_id) if view.input_ids is not None else None
    if video is None or not bool(video.any()):
        return fixed_grid(view)
    still = view.visual & ~video
    order, frame = ordinals(still), ordinals(video)
    pictures = order.div(view.tile, rounding_mode="floor")
    count = pictures.amax(1, keepdim=True) + 1
    image = torch.where(video, count + frame.div(view.tile + 1, rounding_mode="floor"), pictures)
    moving = grid_positions(frame % (view.tile + 1), view.tile + 1)
    return image, torch.where(video[..., None], moving, grid_positions(order % view.tile, view.tile))


def line(view: View) -> tuple[Tensor, Tensor]:
    """One unbroken run per picture, of a width that cannot be told from the call: tokens count as one column."""
    run, within = run_index(view.visual), within_run(view.visual)
    place = torch.stack([within, torch.zeros_like(within)], -1)
    return run, scaled_positions(place, run, view.visual)


def latents(view: View) -> tuple[Tensor, Tensor]:
    """Tokens that a resampler drew from the whole picture, so that they lie nowhere: each counts as its middle."""
    run = run_index(view.visual)
    return run, torch.full((*run.shape, 2), 0.5, device=run.device)


def rotary_grid(view: View) -> tuple[Tensor, Tensor]:
    """Rows and columns are the last two kinds of M-RoPE positions (Qwen2-VL and its relatives).

    Within a run, a picture keeps its temporal position and a video moves it on: a change starts a new picture only
    at picture tokens.
    """
    if view.position_ids is None or view.position_ids.ndim < 3:
        return line(view)
    time, rows, columns = view.position_ids[-3:].expand(3, *view.visual.shape)
    if view.input_ids is not None:
        time = time.masked_fill(view.input_ids == getattr(view.config, "video_token_id", -1), 0)
    image = changes(time, view.visual)
    return image, scaled_positions(torch.stack([rows, columns], -1), image, view.visual)


def ordinals(visual: Tensor) -> Tensor:
    """[B, L] long: each visual token's index among the visual tokens of its row."""
    return visual.long().cumsum(1) - 1


def run_index(visual: Tensor) -> Tensor:
    """[B, L] long: which unbroken run of visual tokens a token belongs to, counted per row."""
    starts = visual & ~torch.nn.functional.pad(visual, (1, -1))
    return starts.long().cumsum(1) - 1


def within_run(visual: Tensor) -> Tensor:
    """[B, L] long: each visual token's index within its unbroken run."""
    slots = torch.arange(visual.shape[1], device=visual.device).expand_as(visual)
    starts = visual & ~torch.nn.functional.pad(visual, (1, -1))
    return slots - torch.where(starts, slots, 0).cummax(1).values


def grid_positions(within: Tensor, tokens: int) -> Tensor:
    """[B, L, 2] positions on a square grid of `tokens` tokens in raster order, given the index within the grid.

    Tokens beyond the largest square (such as a leading [CLS]) come first and lie in the middle.
    """
    side = math.isqrt(tokens)
    place = within - (tokens - side * side)
    centres = (torch.stack([place.div(side, rounding_mode="floor"), place % side], -1) + 0.5) / side
    return torch.where(place[..., None] < 0, 0.5, centres)


def scaled_positions(coordinates: Tensor, image: Tensor, visual: Tensor) -> Tensor:
    """[B, L, 2] positions from integer (row, column) `coordinates` [B, L, 2], scaled to each image's own extent.

    `image` [B, L] long says which image of its sample a token belongs to.
    """
    groups = image.masked_fill(~visual, 0)
    groups = groups + torch.arange(len(groups), device=groups.device)[:, None] * (groups.max() + 1)
    flat, index = coordinates[visual].float(), groups[visual][:, None].expand(-1, 2)
    size = int(index.max()) + 1 if len(index) else 0
    empty = flat.new_zeros(size, 2)
    low = empty.scatter_reduce(0, index, flat, "amin", include_self=False)
    high = empty.scatter_reduce(0, index, flat, "amax", include_self=False)
    low, high = low.gather(0, index), high.gather(0, index)
    positions = coordinates.new_zeros(coordinates.shape, dtype=torch.float32)
    positions[visual] = (flat - low + 0.5) / (high - low + 1)
    return positions


def changes(values: Tensor, visual: Tensor) -> Tensor:
    """[B, L] long: a running count, per row, of visual tokens whose `values` [B, L] differ from the token before.

    Each unbroken run of visual tokens starts a new count too, so equal counts mean "same run, same value".
    """
    before = torch.nn.functional.pad(values, (1, -1))
    starts = visual & (~torch.nn.functional.pad(visual, (1, -1)) | (values != before))
    return starts.long().cumsum(1) - 1
