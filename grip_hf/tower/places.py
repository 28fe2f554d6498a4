"""Where the rows of a vision tower lie, which of them leave, and how the others are cut out and put back.

Pure tensor functions. A *group* is the square of patches that makes one visual token; a *picture* is one picture or
tile of a batch, or one frame of a video.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ..engine.keepsets import topk_mask
from ..engine.plan import take
from ..errors import GripError
from ..families.towers import window_order


@dataclasses.dataclass(frozen=True)
class Places:
    """The patch rows of one call of a tower.

    Attributes:
        rows: [P, G, M] long, the rows of each group, counted over the whole call ([P * S] of a rectangular one).
        mask: [P, G] bool, False at padding, which cannot be chosen.
        tokens: [P, G] bool, the groups that make a visual token; padding of a square picture does.
        positions: [P, G, 2] float, (row, column) of a group's centre in its picture, in [0, 1].
        pixels: [P, G, M] long, the same rows before a tower with windows reordered them.
    """

    rows: Tensor
    mask: Tensor
    tokens: Tensor
    positions: Tensor
    pixels: Tensor

    def pick(self, values: Tensor) -> Tensor:
        """Values [rows, C] of the groups, the mean of their rows: [P, G, C], zeros at padding."""
        picked = values[self.rows[..., 0]] if self.rows.shape[-1] == 1 else values[self.rows].mean(2)
        return picked.masked_fill(~self.mask[..., None], 0)


def square_places(
    pictures: int, length: int, prefix: int, merge: int, real: Tensor | None, device: torch.device
) -> Places:
    """Rows of a batch of pictures of one square size.

    Args:
        pictures: P.
        length: Rows of a picture, with the prefix.
        prefix: Leading rows that are no patches.
        merge: Patches on a side of a group.
        real: [P, length] bool, False at rows of padding; or None.
        device: Where to.

    Raises:
        GripError: The patches make no square that groups divide.
    """
    side = math.isqrt(length - prefix)
    if side * side != length - prefix or side % merge:
        raise GripError(
            f"cannot drop rows of a vision tower with {length - prefix} patches per picture: they make no square that "
            f"{merge} x {merge} divide; use tower_keep_ratio=None or square pictures"
        )
    across = side // merge
    grid = torch.arange(side * side, device=device).view(across, merge, across, merge)
    within = grid.transpose(1, 2).reshape(across * across, merge * merge) + prefix
    rows = within + length * torch.arange(pictures, device=device)[:, None, None]
    tokens = torch.ones(rows.shape[:2], dtype=torch.bool, device=device)
    mask = tokens if real is None else real.flatten()[rows].any(-1)
    return Places(rows, mask, tokens, _centres(across, across, device).expand(pictures, -1, -1), rows)


def shaped_places(shapes: Tensor, length: int, merge: int, device: torch.device) -> Places:
    """Rows of a batch of pictures of any size, padded to one length.

    Args:
        shapes: [P, 2] rows and columns of patches.
        length: Rows of a picture, with padding.
        merge: Patches on a side of a group.
        device: Where to.

    Raises:
        GripError: Groups do not divide a picture, or what pads it.
    """
    rows, masks, positions = [], [], []
    for tall, wide in shapes.tolist():
        if tall % merge or wide % merge or (length - tall * wide) % merge**2:
            raise GripError(
                f"cannot drop rows of a picture of {tall} x {wide} patches padded to {length}: {merge} x {merge} do "
                "not divide it; use tower_keep_ratio=None"
            )
        grid = torch.arange(tall * wide, device=device).view(tall // merge, merge, wide // merge, merge)
        groups = grid.transpose(1, 2).reshape(-1, merge**2)
        padding = torch.arange(tall * wide, length, device=device).view(-1, merge**2)
        rows.append(torch.cat([groups, padding]))
        masks.append(torch.arange(len(rows[-1]), device=device) < len(groups))
        centres = _centres(tall // merge, wide // merge, device)
        positions.append(torch.cat([centres, centres.new_zeros(len(padding), 2)]))
    mask = torch.stack(masks)
    index = torch.stack(rows) + length * torch.arange(len(rows), device=device)[:, None, None]
    return Places(index, mask, mask, torch.stack(positions), index)


def packed_places(grid: Tensor, merge: int, window: int, device: torch.device) -> Places:
    """Rows of pictures of any size that lie one after the other, the rows of a group next to each other.

    Args:
        grid: [pictures, 3] frames, rows and columns of patches.
        merge: Patches on a side of a group.
        window: Groups on a side of a window that the tower orders them by, or 0.
        device: Where to.
    """
    frames = [(rows // merge, columns // merge) for times, rows, columns in grid.tolist() for _ in range(times)]
    lengths = torch.tensor([rows * columns for rows, columns in frames], device=device)
    total, widest = int(lengths.sum()), int(lengths.max())
    order = torch.arange(total, device=device)
    if window:
        order = window_order(grid.cpu(), merge, window).to(device)
    centres = torch.cat([_centres(rows, columns, device) for rows, columns in frames])[order]
    slots = torch.arange(widest, device=device)
    mask = slots < lengths[:, None]
    group = ((lengths.cumsum(0) - lengths)[:, None] + slots) * mask
    within = torch.arange(merge * merge, device=device)
    pixels = order[group][..., None] * merge**2 + within
    return Places(group[..., None] * merge**2 + within, mask, mask, centres[group], pixels)


def _centres(rows: int, columns: int, device: torch.device) -> Tensor:
    """[rows * columns, 2] centres of a grid's cells in raster order."""
    axes = [(torch.arange(size, device=device) + 0.5) / size for size in (rows, columns)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which rows of one call stay.

    Attributes:
        index: [P, K] long, rows of each picture, or [K] long of packed ones; rising.
        length: Rows of a picture, or of all packed ones.
        alive: [P, G] bool, the groups whose rows stay.
    """

    index: Tensor
    length: int
    alive: Tensor

    @property
    def packed(self) -> bool:
        """Whether pictures lie one after the other."""
        return self.index.ndim == 1

    @property
    def kept(self) -> int:
        """K."""
        return self.index.shape[-1]

    def take(self, values: Tensor) -> Tensor:
        """Rows [K, ...] of packed values [S, ...], or [P, K, ...] of [P, S, ...]."""
        return values[self.index] if self.packed else take(values, self.index)

    def put_back(self, values: Tensor, around: Tensor) -> Tensor:
        """`around` [.., S, C] with `values` [.., K, C] in the rows that stay."""
        if self.packed:
            return around.index_copy(0, self.index, values)
        return around.scatter(1, self.index[..., None].expand_as(values), values)


def choose(scores: Tensor, places: Places, counts: Tensor, length: int, packed: bool) -> Plan:
    """Keep the best groups of each picture.

    Args:
        scores: [P, G] float.
        places: Where they lie.
        counts: [P] long, groups to keep.
        length: Rows of a picture, or of all packed ones.
        packed: Whether they are packed.

    Raises:
        NonFiniteScoreError: A score is NaN or infinite.
    """
    alive = topk_mask(scores, places.mask, counts)
    taken = alive
    if not packed:
        # Every picture keeps as many groups, so that the batch stays rectangular: one with padding fills up with it,
        # which its mask goes on hiding, and where that does not suffice with its next best groups.
        best = scores.masked_fill(~places.mask, 0).argsort(dim=1, descending=True, stable=True)
        rank = (2 * alive.byte() + (~places.mask).byte()).gather(1, best)
        order = best.gather(1, rank.argsort(dim=1, descending=True, stable=True))
        taken = torch.zeros_like(alive).scatter(1, order[:, : int(alive.sum(1).max())], True)
        alive = taken
    pictures = 1 if packed else len(alive)
    stays = torch.ones(pictures * length, dtype=torch.bool, device=alive.device)
    stays[places.rows[places.mask if packed else torch.ones_like(alive)].flatten()] = False
    stays[places.rows[taken].flatten()] = True
    if packed:
        return Plan(stays.nonzero().flatten(), length, alive)
    return Plan(stays.view(pictures, length).nonzero()[:, 1].view(pictures, -1), length, alive)


def cut_lengths(cumulative: Tensor, index: Tensor, length: int) -> Tensor:
    """Cumulative lengths [segments + 1] of packed sequences, when the rows `index` [K] of `length` are left.

    Segments that have none left go.
    """
    left = torch.zeros(length + 1, dtype=cumulative.dtype, device=cumulative.device)
    left[index.to(left.device) + 1] = 1
    return left.cumsum(0, dtype=cumulative.dtype)[cumulative.long()].unique_consecutive()
