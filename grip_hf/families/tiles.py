"""Layouts of families that cut a picture into tiles, or into rows, told apart by runs of tokens and what lies between.

See `layouts`; pure tensor functions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .layouts import View, grid_positions, line, ordinals, run_index, scaled_positions, within_run


def tiles_in_run(view: View) -> tuple[Tensor, Tensor]:
    """One unbroken run per picture, which may hold several square tiles."""
    if not view.tile:
        return line(view)
    within = within_run(view.visual) % view.tile
    return run_index(view.visual), grid_positions(within, view.tile)


def marked_tiles(view: View) -> tuple[Tensor, Tensor]:
    """One unbroken run per tile, each after a marker token such as <row_1_col_2>; a whole view ends each picture.

    So the marker of a row's last run is that of whole views. Without token ids each tile counts as a picture.
    """
    run, within = run_index(view.visual), within_run(view.visual)
    positions = grid_positions(within % view.tile, view.tile)
    if view.input_ids is None:
        return run, positions
    markers, starts = view.before(), view.visual & (within == 0)
    slots = torch.arange(starts.shape[1], device=starts.device)
    begin = torch.where(starts, slots, 0).cummax(1).values
    whole = (starts & (markers == markers.gather(1, begin[:, -1:]))).long()
    return whole.cumsum(1) - whole.gather(1, begin), positions  # whole views before the token's own run


def started_tiles(view: View) -> tuple[Tensor, Tensor]:
    """One unbroken run per tile; a start token of its own begins each picture (Ovis2)."""
    positions = grid_positions(within_run(view.visual) % view.tile, view.tile)
    markers = view.config.visual_indicator_token_ids
    if view.input_ids is None or not markers:
        return run_index(view.visual), positions
    # A prompt cut off before its first start token still begins with a picture.
    started = (view.input_ids.to(view.visual.device) == markers[0]).long().cumsum(1) - 1
    return started.clamp(min=0), positions


def joined_tiles(view: View) -> tuple[Tensor, Tensor]:
    """One unbroken run per tile, with one and the same token between the tiles of a picture (Cohere2 Vision)."""
    positions = grid_positions(within_run(view.visual) % view.tile, view.tile)
    return joined_runs(view.visual, view.before()), positions


def joined_rows(view: View) -> tuple[Tensor, Tensor]:
    """One unbroken run per row, with one and the same token between the rows of a picture (Mistral3)."""
    image = joined_runs(view.visual, view.before())
    place = torch.stack([run_index(view.visual), within_run(view.visual)], -1)
    return image, scaled_positions(place, image, view.visual)


def started_rows(view: View) -> tuple[Tensor, Tensor]:
    """Views of rows as in `joined_rows`; a whole view, with a start token of its own, begins each picture (Molmo2).

    Without token ids each view counts as a picture. Frames have other start tokens: a video counts as one picture.
    """
    image, positions = joined_rows(view)
    if view.input_ids is None:
        return image, positions
    start = view.config.low_res_image_start_token_id
    return ((view.input_ids.to(view.visual.device) == start).long().cumsum(1) - 1).clamp(min=0), positions


def newline_rows(view: View) -> tuple[Tensor, Tensor]:
    """A base picture, then a grid whose rows end with a learned newline embedding (LLaVA-NeXT, LLaVA-OneVision)."""
    newline: Tensor = view.base.image_newline  # type: ignore[assignment]
    ends = (view.embeds == newline.to(view.embeds)).all(-1) & view.visual
    return newline_coordinates(view.visual, ends, view.tile)


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


def alternating(anchored: Tensor, value: Tensor, flips: Tensor) -> Tensor:
    """[N] bool: a state that is set to `value` where `anchored`, and else flipped or kept as `flips` says.

    All [N] bool, in order; the first entry must be anchored. A scan without a loop: between two anchors only the
    number of flips counts.
    """
    order = torch.arange(len(anchored), device=anchored.device)
    anchor = torch.where(anchored, order, 0).cummax(0).values
    turns = (flips & ~anchored).long().cumsum(0)
    return value[anchor] ^ ((turns - turns[anchor]) % 2 == 1)
