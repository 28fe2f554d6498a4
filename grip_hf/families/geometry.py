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


def alternating(anchored: Tensor, value: Tensor, flips: Tensor) -> Tensor:
    """[N] bool: a state that is set to `value` where `anchored`, and else flipped or kept as `flips` says.

    All [N] bool, in order; the first entry must be anchored. A scan without a loop: between two anchors only the
    number of flips counts.
    """
    order = torch.arange(len(anchored), device=anchored.device)
    anchor = torch.where(anchored, order, 0).cummax(0).values
    turns = (flips & ~anchored).long().cumsum(0)
    return value[anchor] ^ ((turns - turns[anchor]) % 2 == 1)


def joined_runs(visual: Tensor, before: Tensor) -> Tensor:
    """[B, L] long: which picture a token belongs to if a picture has several runs, one token apart.

    A run goes on with the picture of the run before it if the one token between them is the picture's usual one: the
    first such token after the picture's first run. `before` [B, L] long holds the id before each position.
    """
    left = torch.nn.functional.pad(visual, (1, -1))
    starts, fresh = visual & ~left, torch.zeros_like(visual)
    # A run is joined to the one before it if exactly one position lies between; equal tokens between make a block.
    joined = starts & torch.nn.functional.pad(left, (1, -1))
    chained, token = joined[starts], before[starts]
    earlier = torch.nn.functional.pad(chained[:-1], (1, 0))
    begins = chained & (~earlier | (token != torch.nn.functional.pad(token[:-1], (1, 0), value=-1)))
    block = begins.long().cumsum(0) - 1
    lengths = torch.bincount(block[chained], minlength=int(begins.sum()))
    if len(lengths):
        # The first token of a block either parts two pictures, or is what is usual from there on: in a chain's first
        # block it is; after a block of several it parts; after a block of one it does what that one did not.
        first, single = ~earlier[begins], lengths == 1
        after_several = torch.nn.functional.pad(~single[:-1], (1, 0))
        usual = alternating(first | after_several, first, torch.ones_like(first))
        parts = begins.clone()
        parts[begins] = ~usual
        fresh[starts] = ~chained | parts
    else:
        fresh[starts] = True
    return fresh.long().cumsum(1) - 1


def newline_coordinates(visual: Tensor, newline: Tensor, base: int) -> tuple[Tensor, Tensor]:
    """Images of a row grid whose every row ends with a "newline" token, after a square base picture.

    One image goes on as long as newlines come at the same distance; what follows the last one is an image of its own.

    Args:
        visual: [B, L] bool.
        newline: [B, L] bool, which visual tokens are newline tokens.
        base: number of tokens of the base picture, which has no newline.

    Returns:
        image [B, L] long, and positions [B, L, 2].
    """
    order = ordinals(visual)
    ends = newline & visual
    row, place = ends.nonzero(as_tuple=True)
    ordinal = order[row, place]
    image = torch.zeros_like(visual, dtype=torch.long)
    within = order.clone()
    width, rows = torch.zeros_like(order), torch.zeros_like(order)
    if len(row):
        same_row = torch.nn.functional.pad(row[1:] == row[:-1], (1, 0))
        distance = torch.where(same_row, ordinal - torch.nn.functional.pad(ordinal[:-1], (1, 0)), ordinal + 1)
        last = torch.nn.functional.pad(distance[:-1], (1, 0))
        # A newline begins an image unless it comes one width after the one before. The width is the last distance, but
        # for an image's first newline, which has the base picture before it too.
        new_if_first = (distance != last - base) | (last - base <= 1)
        new_if_not = distance != last
        decided = ~same_row | (new_if_first & new_if_not)
        begins = alternating(decided, torch.ones_like(decided), new_if_not & ~new_if_first)
        number = begins.long().cumsum(0) - 1  # counted over the whole batch
        count = torch.bincount(number)
        wide = (distance - base)[begins]
        start = (ordinal - distance + 1)[begins]
        # Each token belongs to the image of the next newline at or after it; those after a row's last one are left.
        following = torch.flip(torch.flip(ends, [1]).long().cumsum(1), [1])
        index = (
            ends.long().cumsum(1)
            - ends.long()
            + (torch.nn.functional.pad(ends.sum(1).cumsum(0)[:-1], (1, 0)))[:, None]
        )
        held = visual & (following > 0)
        mine = number[index.clamp(max=len(number) - 1)]
        first = torch.nn.functional.pad(torch.bincount(row[begins], minlength=len(visual)).cumsum(0)[:-1], (1, 0))
        images = torch.bincount(row[begins], minlength=len(visual))
        image = torch.where(held, mine - first[:, None], images[:, None])
        stop = torch.where(ends, order + 1, 0).amax(1, keepdim=True)
        within = torch.where(held, order - start[mine], order - stop)
        width, rows = torch.where(held, wide[mine], 0), torch.where(held & (wide[mine] > 1), count[mine], 0)
    grid = within - base
    side = math.isqrt(base)
    square = (torch.stack([within // side, within % side], -1) + 0.5) / side
    across = width.clamp(min=1)
    centre = torch.stack([(grid // across + 0.5) / rows.clamp(min=1), (grid % across + 0.5) / across], -1)
    middle = torch.full_like(centre, 0.5)
    inside = ((within < base) & visual)[..., None]
    gridded = ((within >= base) & (rows > 0) & visual)[..., None]
    return image.masked_fill(~visual, 0), torch.where(inside, square, torch.where(gridded, centre, middle))
