"""Where each visual token lies: which image of its sample, and where in that image. Pure tensor functions.

All work on `visual` [B, L] bool and return [B, L] or [B, L, 2]; values at other positions are meaningless. Positions
are (row, column) of the token's centre in [0, 1]; for families that cut an image into tiles, within the tile.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


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


def joined_runs(visual: Tensor, before: Tensor) -> Tensor:
    """[B, L] long: which picture a token belongs to if a picture has several runs, one token apart.

    A run goes on with the picture of the run before it if the one token between them is the picture's usual one: the
    first such token after the picture's first run. `before` [B, L] long holds the id before each position.
    """
    fresh = torch.zeros_like(visual)
    for row, (columns, ids) in enumerate(zip(visual, before, strict=True)):
        usual, last = None, -2
        for column in columns.nonzero().flatten().tolist():
            if column == last + 2 and usual in (None, int(ids[column])):
                usual = int(ids[column])
            elif column != last + 1:
                fresh[row, column], usual = True, None
            last = column
    return fresh.long().cumsum(1) - 1


def newline_coordinates(visual: Tensor, newline: Tensor, base: int) -> tuple[Tensor, Tensor]:
    """Images of a row grid whose every row ends with a "newline" token, after a square base picture.

    Args:
        visual: [B, L] bool.
        newline: [B, L] bool, which visual tokens are newline tokens.
        base: number of tokens of the base picture, which has no newline.

    Returns:
        image [B, L] long, and positions [B, L, 2].
    """
    image = torch.zeros_like(visual, dtype=torch.long)
    positions = torch.full((*visual.shape, 2), 0.5)
    side = math.isqrt(base)
    square = (torch.stack([torch.arange(base) // side, torch.arange(base) % side], -1) + 0.5) / side
    for row, (is_visual, is_newline) in enumerate(zip(visual.tolist(), newline.tolist(), strict=True)):
        columns = [i for i, seen in enumerate(is_visual) if seen]
        ends = [k for k, column in enumerate(columns) if is_newline[column]]
        for number, (start, rows, stop) in enumerate(_newline_images(len(columns), ends, base)):
            place = torch.tensor(columns[start:stop])
            image[row, place] = number
            positions[row, place[:base]] = square[: len(place)]
            if rows:
                width = (stop - start - base) // rows
                grid = torch.arange(rows * width)
                centres = torch.stack([(grid // width + 0.5) / rows, (grid % width + 0.5) / width], -1)
                positions[row, place[base:]] = centres
    return image.to(visual.device), positions.to(visual.device)


def _newline_images(total: int, ends: list[int], base: int) -> list[tuple[int, int, int]]:
    """(start, grid rows, stop) of each image, in ordinals, from the ordinals of the newline tokens."""
    images: list[tuple[int, int, int]] = []
    start = 0
    while start < total:
        mine = [end for end in ends if end >= start + base]
        if not mine:
            images.append((start, 0, total))
            break
        width = mine[0] - (start + base) + 1
        rows = 1
        # One image goes on as long as newlines come at the same distance.
        while width > 1 and rows < len(mine) and mine[rows] - mine[rows - 1] == width:
            rows += 1
        stop = start + base + rows * width
        images.append((start, rows if width > 1 else 0, stop))
        start = stop
    return images
