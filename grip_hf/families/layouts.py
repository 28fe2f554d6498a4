"""How each kind of family lays out its visual tokens: which image each belongs to, and where in it.

A layout takes a `Scene`, one call of the language model before pruning, and gives `image` [B, L] long and `positions`
[B, L, 2] float, (row, column) in [0, 1]. It reads nothing but what every call has, because `generate` encodes pictures
beforehand and does not pass on their sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import geometry as layout


@dataclasses.dataclass(frozen=True)
class Scene:
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


Layout = Callable[[Scene], tuple[Tensor, Tensor]]


def fixed_grid(scene: Scene) -> tuple[Tensor, Tensor]:
    """Every picture has the same number of tokens, a square and perhaps a leading [CLS]."""
    order = layout.ordinals(scene.visual)
    return order.div(scene.tile, rounding_mode="floor"), layout.grid_positions(order % scene.tile, scene.tile)


def frames(scene: Scene) -> tuple[Tensor, Tensor]:
    """Pictures as in `fixed_grid`; every frame of a video has a [CLS] token besides (Video-LLaVA)."""
    video = scene.visual & (scene.input_ids == scene.config.video_token_id) if scene.input_ids is not None else None
    if video is None or not bool(video.any()):
        return fixed_grid(scene)
    still = scene.visual & ~video
    order, frame = layout.ordinals(still), layout.ordinals(video)
    pictures = order.div(scene.tile, rounding_mode="floor")
    count = pictures.amax(1, keepdim=True) + 1
    image = torch.where(video, count + frame.div(scene.tile + 1, rounding_mode="floor"), pictures)
    moving = layout.grid_positions(frame % (scene.tile + 1), scene.tile + 1)
    return image, torch.where(video[..., None], moving, layout.grid_positions(order % scene.tile, scene.tile))


def tiles_in_run(scene: Scene) -> tuple[Tensor, Tensor]:
    """One unbroken run per picture, which may hold several square tiles."""
    if not scene.tile:
        return line(scene)
    within = layout.within_run(scene.visual) % scene.tile
    return layout.run_index(scene.visual), layout.grid_positions(within, scene.tile)


def marked_tiles(scene: Scene) -> tuple[Tensor, Tensor]:
    """One unbroken run per tile, each after a marker token such as <row_1_col_2>; a whole view ends each picture.

    So the marker of a row's last run is that of whole views. Without token ids each tile counts as a picture.
    """
    run, within = layout.run_index(scene.visual), layout.within_run(scene.visual)
    positions = layout.grid_positions(within % scene.tile, scene.tile)
    if scene.input_ids is None:
        return run, positions
    markers, starts = scene.before(), scene.visual & (within == 0)
    slots = torch.arange(starts.shape[1], device=starts.device)
    begin = torch.where(starts, slots, 0).cummax(1).values
    whole = (starts & (markers == markers.gather(1, begin[:, -1:]))).long()
    return whole.cumsum(1) - whole.gather(1, begin), positions  # whole views before the token's own run


def started_tiles(scene: Scene) -> tuple[Tensor, Tensor]:
    """One unbroken run per tile; a start token of its own begins each picture (Ovis2)."""
    positions = layout.grid_positions(layout.within_run(scene.visual) % scene.tile, scene.tile)
    markers = scene.config.visual_indicator_token_ids
    if scene.input_ids is None or not markers:
        return layout.run_index(scene.visual), positions
    # A prompt cut off before its first start token still begins with a picture.
    started = (scene.input_ids.to(scene.visual.device) == markers[0]).long().cumsum(1) - 1
    return started.clamp(min=0), positions


def joined_tiles(scene: Scene) -> tuple[Tensor, Tensor]:
    """One unbroken run per tile, with one and the same token between the tiles of a picture (Cohere2 Vision)."""
    positions = layout.grid_positions(layout.within_run(scene.visual) % scene.tile, scene.tile)
    return layout.joined_runs(scene.visual, scene.before()), positions


def joined_rows(scene: Scene) -> tuple[Tensor, Tensor]:
    """One unbroken run per row, with one and the same token between the rows of a picture (Mistral3)."""
    image = layout.joined_runs(scene.visual, scene.before())
    place = torch.stack([layout.run_index(scene.visual), layout.within_run(scene.visual)], -1)
    return image, layout.scaled_positions(place, image, scene.visual)


def started_rows(scene: Scene) -> tuple[Tensor, Tensor]:
    """Views of rows as in `joined_rows`; a whole view, with a start token of its own, begins each picture (Molmo2).

    Without token ids each view counts as a picture. Frames have other start tokens: a video counts as one picture.
    """
    view, positions = joined_rows(scene)
    if scene.input_ids is None:
        return view, positions
    start = scene.config.low_res_image_start_token_id
    return ((scene.input_ids.to(scene.visual.device) == start).long().cumsum(1) - 1).clamp(min=0), positions


def line(scene: Scene) -> tuple[Tensor, Tensor]:
    """One unbroken run per picture, of a width that cannot be told from the call: tokens count as one column."""
    run, within = layout.run_index(scene.visual), layout.within_run(scene.visual)
    place = torch.stack([within, torch.zeros_like(within)], -1)
    return run, layout.scaled_positions(place, run, scene.visual)


def latents(scene: Scene) -> tuple[Tensor, Tensor]:
    """Tokens that a resampler drew from the whole picture, so that they lie nowhere: each counts as its middle."""
    run = layout.run_index(scene.visual)
    return run, torch.full((*run.shape, 2), 0.5, device=run.device)


def newline_rows(scene: Scene) -> tuple[Tensor, Tensor]:
    """A base picture, then a grid whose rows end with a learned newline embedding (LLaVA-NeXT, LLaVA-OneVision)."""
    newline: Tensor = scene.base.image_newline  # type: ignore[assignment]
    ends = (scene.embeds == newline.to(scene.embeds)).all(-1) & scene.visual
    return layout.newline_coordinates(scene.visual, ends, scene.tile)


def rotary_grid(scene: Scene) -> tuple[Tensor, Tensor]:
    """Rows and columns are the last two kinds of M-RoPE positions (Qwen2-VL and its relatives).

    Within a run, a picture keeps its temporal position and a video moves it on: a change starts a new picture only
    at picture tokens.
    """
    if scene.position_ids is None or scene.position_ids.ndim < 3:
        return line(scene)
    time, rows, columns = scene.position_ids[-3:].expand(3, *scene.visual.shape)
    if scene.input_ids is not None:
        time = time.masked_fill(scene.input_ids == getattr(scene.config, "video_token_id", -1), 0)
    image = layout.changes(time, scene.visual)
    return image, layout.scaled_positions(torch.stack([rows, columns], -1), image, scene.visual)
