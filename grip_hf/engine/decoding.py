"""The arguments of a one-token step on a pruned cache: as little as possible is done to them, so that it compiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import masks, upstream
from .arguments import outgrows_window
from .cache import CacheState, physical, physical_length


def _static_columns(mask: Tensor, cache: Any, state: CacheState, sliding: bool) -> Tensor:
    """A prepared mask [B, heads, 1, slots] of a static cache's layers, with the columns of what their slots hold."""
    if not sliding:
        assert state.columns is not None
        return masks.pick_columns(mask, state.columns)
    held = int(physical(cache).get_seq_length(upstream.first_layer(cache, sliding=True)))
    known = state.keys(state.index.shape[1])
    return masks.pick_columns(mask, masks.window_columns(known, state.dropped, held, mask.shape[3]))


def decodes_simply(mask: Any, config: Any, cache: Any, state: CacheState) -> bool:
    """Whether `decode_arguments` can do a one-token step on a pruned cache."""
    if mask is None and cache.is_compileable and "flash" in upstream.attention_kernel(config):
        return False  # it tells the filled part of a static cache from the length of a mask
    several = isinstance(mask, dict)
    if several or (mask is not None and mask.ndim == 4):
        if several and not all("full" in kind or "sliding" in kind or kind in upstream.RECURRENT for kind in mask):
            return False  # chunked attention has windows of another kind
        prepared = [one for kind, one in mask.items() if kind not in upstream.RECURRENT] if several else [mask]
        return bool(cache.is_compileable) and all(one is not None and one.ndim == 4 for one in prepared)
    if mask is not None and mask.ndim != 2:
        return False
    reach = upstream.sliding_window(config)
    if reach is None:
        return True
    # Far enough behind the dropped positions, a window holds only what is contiguous.
    behind = physical_length(cache) - state.index.shape[1]
    return bool(behind >= reach) or not outgrows_window(config, state.visual.shape[1] + behind + 1)


def decode_arguments(arguments: dict[str, Any], cache: Any, state: CacheState) -> dict[str, Any]:
    """Arguments of a one-token step on a pruned cache (see `decodes_simply`); does as little as possible.

    Only what differs from the unpruned call is rebuilt: columns of a given mask, the mask that `generate` leaves out
    when nothing is padded although fillers are, and positions that would be counted from the physical length.
    """
    mask = arguments.get("attention_mask")
    new: dict[str, Any] = {}
    if mask is None:
        if not state.full:
            new["attention_mask"] = masks.mask_2d(None, state.keys(physical_length(cache) + 1))
    elif isinstance(mask, dict):
        new["attention_mask"] = {
            kind: one if kind in upstream.RECURRENT else _static_columns(one, cache, state, "sliding" in kind)
            for kind, one in mask.items()
        }
    elif mask.ndim == 4:
        only_windows = upstream.first_layer(cache, sliding=False) is None
        new["attention_mask"] = _static_columns(mask, cache, state, only_windows)
    else:
        head = mask.gather(1, state.index)
        head = head if state.full else head * state.valid.to(head.dtype)
        new["attention_mask"] = torch.cat([head, mask[:, state.index.shape[1] + state.dropped :]], 1)
    positions = arguments.get("position_ids")
    if positions is None:
        positions = torch.arange(1, device=state.index.device)[None] + cache.get_seq_length()
        new["position_ids"] = positions
    if state.shift is not None:
        new["position_ids"] = positions - state.shift
    return {**arguments, **new} if new else arguments
