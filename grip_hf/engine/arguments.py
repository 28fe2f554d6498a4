"""Rewrite the arguments of one language-model call for a plan. Nothing is changed in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import GripError
from . import masks, upstream
from .attention_masks import attention_masks, flash_arguments, outgrows_window
from .cache import CacheState, physical, physical_length
from .call import Call, Step
from .plan import Plan, compact_positions, take, take_last


def check(call: Call) -> None:
    """Refuse what cannot be pruned, or is not as long as the call.

    Raises:
        GripError: An argument has one entry per token and is not known here, or has another length.
    """
    batch, length = call.visual.shape
    arguments = call.arguments
    for name in upstream.per_token_names(arguments, batch, length):
        raise GripError(
            f"cannot prune a call with the argument {name!r} of shape {tuple(arguments[name].shape)}: it has one "
            "entry per token and grip_hf does not know how to prune it"
        )
    lengths = {
        name: arguments[name].shape[1] for name in upstream.PER_TOKEN if isinstance(arguments.get(name), Tensor)
    }
    if call.positions is not None:
        lengths["position_ids"] = call.positions.shape[-1]
    visual = arguments.get("visual_pos_masks")
    if visual is not None:
        lengths["visual_pos_masks"] = visual.shape[1]
    for name, covered in lengths.items():
        if covered != length:
            raise GripError(f"{name} covers {covered} positions, but the call has {length}")


def real_tokens(mask: Any, past: int, visual: Tensor) -> Tensor:
    """[B, L] bool: which tokens of this call are not padding, from the attention mask(s) of the unpruned call."""
    batch, length = visual.shape
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None:
        return torch.ones_like(visual)
    if mask.ndim == 2:
        if mask.shape[1] != past + length:
            raise GripError(
                f"attention_mask covers {mask.shape[1]} positions, expected {past + length} "
                f"({past} before this call and {length} in it)"
            )
        return (mask[:, past:] != 0).expand(batch, -1)
    own = mask[:, 0].diagonal(mask.shape[-1] - length if mask.shape[-1] < past + length else past, -2, -1)
    return (own if own.dtype == torch.bool else own == 0).expand(batch, -1)  # a token that is no padding sees itself


def prune_arguments(step: Step) -> dict[str, Any]:
    """Arguments of the language model for `step`."""
    call, plan = step.call, step.plan
    upstream.check_mask_sizes(physical(call.cache), step.kept, call.past)
    positions = call.positions
    if positions is None:
        positions = torch.arange(plan.length, device=call.embeds.device)[None] + call.past_logical
    new = dict(call.arguments)
    new["attention_mask"] = attention_masks(step)
    new["position_ids"] = take_last(_renumbered(positions, step), plan.index)
    new.update(flash_arguments(new["attention_mask"], new["position_ids"], step))
    if step.kept == plan.length and plan.full:
        return new  # every token of this call stays; only the keys before it are pruned
    new["inputs_embeds"] = take(call.embeds, plan.index)
    for name in upstream.PER_TOKEN:
        if isinstance(new.get(name), Tensor):
            new[name] = take(new[name], plan.index)
    if new.get("visual_pos_masks") is not None:
        new.update(_deepstack(new, plan))
    return new


def _renumbered(positions: Tensor, step: Step) -> Tensor:
    call = step.call
    if not call.compact:
        return positions
    if call.state is not None and call.state.shift is not None:
        positions = positions - call.state.shift
    return compact_positions(positions, step.keep, call.real)


def _deepstack(arguments: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """Features added to visual tokens in later layers: one row per visual token, in order."""
    visual = arguments["visual_pos_masks"]
    visual = visual if visual.ndim == 2 else visual[..., 0]
    stays = torch.zeros_like(visual).scatter(1, plan.index, plan.valid) & visual
    features = arguments.get("deepstack_visual_embeds")
    return {
        "visual_pos_masks": take(visual, plan.index) & plan.valid,
        "deepstack_visual_embeds": None if features is None else [layer[stays[visual]] for layer in features],
    }


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
