"""Rewrite the arguments of one language-model call for a plan. Nothing is changed in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..errors import GripError
from . import masks
from .attention_masks import RECURRENT, Step, attention_masks, cuts_static_keys, flash_arguments, needs_windows
from .cache import CacheState, physical_length
from .plan import Plan, compact_positions, take, take_last

PER_TOKEN = ("per_layer_inputs", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
UNTOUCHED = ("labels", "shift_labels", "input_ids", "logits_to_keep")
HANDLED = ("inputs_embeds", "attention_mask", "position_ids", "visual_pos_masks", "deepstack_visual_embeds")


def check_unknown(kwargs: dict[str, Any], batch: int, length: int) -> None:
    """Refuse what would stay unpruned: router logits, and tensors with one entry per token that are not known here."""
    if kwargs.get("output_router_logits"):
        raise GripError(
            "cannot prune a call with output_router_logits=True: the router loss would compare the mask of all tokens "
            "with the router logits of the kept ones; train with output_router_logits=False"
        )
    for name, value in kwargs.items():
        if name in PER_TOKEN or name in UNTOUCHED or name in HANDLED or not isinstance(value, Tensor):
            continue
        per_token = value.ndim >= 2 and value.shape[0] in (1, batch) and value.shape[1] == length
        if per_token or name.startswith("cu_seq_lens"):
            raise GripError(
                f"cannot prune a call with the argument {name!r} of shape {tuple(value.shape)}: it has one entry per "
                "token and grip_hf does not know how to prune it"
            )


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


def prune_inputs(kwargs: dict[str, Any], step: Step, config: Any) -> dict[str, Any]:
    """Arguments of the language model for `step`.

    Args:
        kwargs: the arguments of the unpruned call, with `inputs_embeds` [B, L, D].
        step: what stays.
        config: the language model's config.
    """
    plan, embeds = step.plan, kwargs["inputs_embeds"]
    check_unknown(kwargs, *embeds.shape[:2])
    new = dict(kwargs)
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(plan.length, device=embeds.device)[None] + step.past_logical
    new["attention_mask"] = attention_masks(kwargs, positions, step, config)
    new["position_ids"] = take_last(_renumbered(positions, step), plan.index)
    new.update(flash_arguments(new["attention_mask"], new["position_ids"], step, config))
    if plan.index.shape[1] == plan.length and plan.full:
        return new  # every token of this call stays; only the keys before it are pruned
    new["inputs_embeds"] = take(embeds, plan.index)
    for name in PER_TOKEN:
        if isinstance(kwargs.get(name), Tensor):
            _check_length(name, kwargs[name], plan.length)
            new[name] = take(kwargs[name], plan.index)
    if kwargs.get("visual_pos_masks") is not None:
        new.update(_deepstack(kwargs, plan))
    return new


def _check_length(name: str, value: Tensor, length: int) -> None:
    if value.shape[1] != length:
        raise GripError(f"{name} covers {value.shape[1]} positions, but the call has {length}")


def _renumbered(positions: Tensor, step: Step) -> Tensor:
    if not step.compact:
        return positions
    if step.state is not None and step.state.shift is not None:
        positions = positions - step.state.shift
    return compact_positions(positions, step.keep, step.real)[0]


def _deepstack(kwargs: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """Features added to visual tokens in later layers: one row per visual token, in order."""
    visual = kwargs["visual_pos_masks"]
    visual = visual if visual.ndim == 2 else visual[..., 0]
    stays = torch.zeros_like(visual).scatter(1, plan.index, plan.valid) & visual
    features = kwargs.get("deepstack_visual_embeds")
    return {
        "visual_pos_masks": take(visual, plan.index) & plan.valid,
        "deepstack_visual_embeds": None if features is None else [layer[stays[visual]] for layer in features],
    }


def decodes_simply(mask: Any, config: Any, cache: Cache, state: CacheState) -> bool:
    """Whether `decode_inputs` can do a one-token step on a pruned cache."""
    if mask is None and cuts_static_keys(config, cache):
        return False
    prepared = [one for kind, one in mask.items() if kind not in RECURRENT] if isinstance(mask, dict) else [mask]
    if isinstance(mask, dict) or (mask is not None and mask.ndim == 4):
        return state.columns is not None and all(one is not None and one.ndim == 4 for one in prepared)
    if mask is not None and mask.ndim != 2:
        return False
    if getattr(config, "sliding_window", None) is None:
        return True
    # Far enough behind the dropped positions, a window holds only what is contiguous.
    behind = physical_length(cache) - state.index.shape[1]
    return bool(behind >= config.sliding_window) or not needs_windows(config, state.visual.shape[1] + behind + 1)


def decode_inputs(kwargs: dict[str, Any], cache: Cache, state: CacheState) -> dict[str, Any]:
    """Arguments of a one-token step on a pruned cache (see `decodes_simply`); does as little as possible.

    Only what differs from the unpruned call is rebuilt: columns of a given mask, the mask that `generate` leaves out
    when nothing is padded although fillers are, and positions that would be counted from the physical length.
    """
    mask = kwargs.get("attention_mask")
    new: dict[str, Any] = {}
    if mask is None:
        if not state.full:
            new["attention_mask"] = masks.mask_2d(None, state.keys(physical_length(cache) + 1))
    elif state.columns is not None and isinstance(mask, dict):
        new["attention_mask"] = {
            kind: one if kind in RECURRENT else masks.pick_columns(one, state.columns) for kind, one in mask.items()
        }
    elif state.columns is not None and mask.ndim == 4:
        new["attention_mask"] = masks.pick_columns(mask, state.columns)
    else:
        head = mask.gather(1, state.index)
        head = head if state.full else head * state.valid.to(head.dtype)
        new["attention_mask"] = torch.cat([head, mask[:, state.index.shape[1] + state.dropped :]], 1)
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(1, device=state.index.device)[None] + cache.get_seq_length()
        new["position_ids"] = positions
    if state.shift is not None:
        new["position_ids"] = positions - state.shift
    return {**kwargs, **new} if new else kwargs
