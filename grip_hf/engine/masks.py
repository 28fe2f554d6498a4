"""Attention masks for a pruned call, from the masks that were made for the unpruned one. Pure tensor functions.

A `KeyMap` says which logical position lies in each physical slot of the keys: the cached ones and those of this call.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class KeyMap:
    """Physical keys in logical terms.

    Attributes:
        index: [B, P] long, the logical position of each physical key.
        valid: [B, P] bool, False at fillers.
        full: True if every key is valid.
    """

    index: Tensor
    valid: Tensor
    full: bool

    def rows(self, rows: Tensor) -> KeyMap:
        """The keys of the batch rows picked by `rows` (long)."""
        return KeyMap(self.index[rows], self.valid[rows], self.full)


@dataclasses.dataclass(frozen=True)
class Window:
    """The keys that one layer's mask covers: `length` columns, the first of which is key number `offset`."""

    length: int
    offset: int


def blocked(dtype: torch.dtype) -> float:
    """The additive mask value that means "not seen"."""
    return torch.finfo(dtype).min


def mask_2d(mask: Tensor | None, keys: KeyMap) -> Tensor:
    """Mask of the physical keys: `mask` [B, logical keys] (None = all real) gives [B, P], zero at fillers."""
    if mask is None:
        return keys.valid.long()
    picked = mask.gather(1, keys.index)
    return picked if keys.full else picked * keys.valid.to(picked.dtype)


def mask_4d(mask: Tensor, queries: Tensor, keys: KeyMap, logical: Window, physical: Window) -> Tensor:
    """Pick rows and columns of a prepared mask.

    Args:
        mask: [B or 1, heads or 1, L, logical.length], bool (True = seen) or additive float.
        queries: [B, K] long, the rows that stay (local to this call).
        keys: what lies behind the physical keys; slots beyond its end (a static cache's free part) are blocked.
        logical: the columns of `mask`.
        physical: the columns wanted.

    Returns:
        [B, heads or 1, K, physical.length] of the same dtype.
    """
    slots = torch.arange(physical.length, device=mask.device) + physical.offset
    inside = slots.clamp(max=keys.index.shape[1] - 1)
    columns = keys.index[:, inside] - logical.offset
    seen = (slots < keys.index.shape[1]) & keys.valid[:, inside] & (columns >= 0) & (columns < mask.shape[3])
    mask = mask.expand(queries.shape[0], -1, -1, -1)
    mask = mask.gather(2, queries[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    mask = mask.gather(3, columns.clamp(0, mask.shape[3] - 1)[:, None, None].expand(-1, *mask.shape[1:3], -1))
    return restrict(mask, seen[:, None, None])


def window_columns(known: KeyMap, dropped: int, held: int, width: int) -> KeyMap:
    """What lies in the slots of a static layer with a sliding window, as columns of the mask of the unpruned layer.

    Both have `width` slots: the first keys, until they are full, and then the last ones.

    Args:
        known: What lies in the first physical keys.
        dropped: How many positions later keys are behind their logical ones.
        held: Physical keys before this step, which adds one.
        width: Slots, and columns of the mask.
    """
    device, first = known.index.device, max(held - width + 1, 0)
    number = torch.arange(first, first + width, device=device).expand(len(known.index), -1)
    early = number < known.index.shape[1]
    inside = number.clamp(max=known.index.shape[1] - 1)
    logical = torch.where(early, known.index.gather(1, inside), number + dropped)
    there = torch.where(early, known.valid.gather(1, inside), number <= held)
    columns = logical - max(held + dropped - width + 1, 0)
    return KeyMap(columns.clamp(0, width - 1), there & (columns >= 0) & (columns < width), full=False)


def pick_columns(mask: Tensor, columns: KeyMap) -> Tensor:
    """Pick the columns of a prepared mask for every slot of a static cache: [B or 1, heads or 1, Q, slots]."""
    mask = mask.expand(columns.index.shape[0], -1, -1, -1)
    picked = mask.gather(3, columns.index[:, None, None].expand(-1, *mask.shape[1:3], -1))
    return restrict(picked, columns.valid[:, None, None])


def restrict(mask: Tensor, seen: Tensor) -> Tensor:
    """Block what is not `seen` (bool, broadcast) in a bool or additive mask."""
    if mask.dtype == torch.bool:
        return mask & seen
    return mask.masked_fill(~seen, blocked(mask.dtype))


def let_fillers_see(mask: Tensor, valid: Tensor, earlier: int = 0) -> Tensor:
    """Let each filler of a call [B, K] see itself, so that no row of a mask [B, heads, K, keys] is empty.

    Nobody else sees it. The call's keys begin after `earlier` ones.
    """
    own = torch.eye(valid.shape[1], mask.shape[3] - earlier, dtype=torch.bool, device=mask.device)
    own = torch.nn.functional.pad(own, (earlier, 0)) & ~valid[..., None]
    return mask | own[:, None] if mask.dtype == torch.bool else mask.masked_fill(own[:, None], 0)


def causal_4d(
    keys: KeyMap,
    queries: int,
    window: Window,
    segments: Tensor | None = None,
    reach: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Causal mask from scratch.

    Args:
        keys: all physical keys, the last `queries` of which are this call's own tokens.
        queries: K, the physical length of this call.
        window: the columns wanted.
        segments: [B, P] which packed sequence each key belongs to; tokens see only their own.
        reach: sliding window: a token sees keys less than `reach` logical positions before it.
        dtype: None for a bool mask, else the dtype of an additive one.

    Returns:
        [B, 1, K, window.length].
    """
    total, device = keys.index.shape[1], keys.index.device
    slots = torch.arange(window.length, device=device) + window.offset
    rows = torch.arange(total - queries, total, device=device)
    inside = slots.clamp(max=total - 1)
    seen = (slots[None] <= rows[:, None]) & keys.valid[:, inside][:, None]
    if segments is not None:
        seen = seen & (segments[:, rows][:, :, None] == segments[:, inside][:, None])
    if reach is not None:
        seen = seen & (keys.index[:, inside][:, None] > keys.index[:, rows][:, :, None] - reach)
    seen = seen[:, None]
    if dtype is None:
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, blocked(dtype))
