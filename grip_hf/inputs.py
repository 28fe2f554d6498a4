"""Rewrite the arguments of one language-model call for a plan. Nothing is changed in place."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import find_first_full_attention_index, find_packed_sequence_indices

from . import masks
from .cache import CacheState, physical_length, window
from .errors import GripError
from .masks import KeyMap
from .pruning import Plan, compact_positions, take, take_last

PER_TOKEN = ("per_layer_inputs", "token_type_ids", "mm_token_type_ids")
UNTOUCHED = ("labels", "shift_labels", "input_ids", "logits_to_keep")
HANDLED = ("inputs_embeds", "attention_mask", "position_ids", "visual_pos_masks", "deepstack_visual_embeds")


@dataclasses.dataclass(frozen=True)
class Step:
    """One pruned call of the language model.

    Attributes:
        plan: which positions of the call stay.
        past: physical number of cached keys before the call.
        past_logical: logical number of positions before the call.
        keys: all physical keys, cached and new.
        cache: the cache given to the call, if any.
        state: what earlier calls left on the cache, if any.
        keep: [B, L] bool, which positions stay, and
        real: [B, L] bool, which are not padding; both only used for compact positions.
        compact: True if positions are re-numbered.
    """

    plan: Plan
    past: int
    past_logical: int
    keys: KeyMap
    cache: Cache | None
    state: CacheState | None
    keep: Tensor
    real: Tensor
    compact: bool


def check_unknown(kwargs: dict[str, Any], batch: int, length: int) -> None:
    """Refuse a tensor argument with one entry per token that is not known here: it would stay unpruned."""
    for name, value in kwargs.items():
        if name in PER_TOKEN or name in UNTOUCHED or name in HANDLED or not isinstance(value, Tensor):
            continue
        per_token = value.ndim >= 2 and value.shape[0] in (1, batch) and value.shape[1] == length
        if per_token or name.startswith("cu_seq_lens"):
            raise GripError(
                f"cannot prune a call with the argument {name!r} of shape {tuple(value.shape)}: it has one entry per "
                "token and grip_hf does not know how to prune it"
            )


def logical_mask(mask: Any) -> Tensor | None:
    """The one mask that tells padding, from a 2-D or 4-D mask or a dict of them."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    return mask


def real_tokens(mask: Any, past: int, visual: Tensor) -> Tensor:
    """[B, L] bool: which tokens of this call are not padding, from the attention mask of the unpruned call."""
    batch, length = visual.shape
    mask = logical_mask(mask)
    if mask is None:
        return torch.ones_like(visual)
    if mask.ndim == 2:
        if mask.shape[1] != past + length:
            raise GripError(
                f"attention_mask covers {mask.shape[1]} positions, expected {past + length} "
                f"({past} before this call and {length} in it)"
            )
        return (mask[:, past:] != 0).expand(batch, -1)
    last = mask[:, 0, -1, past : past + length]
    return (last if last.dtype == torch.bool else last == 0).expand(batch, -1)


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
    segments = _packed_segments(kwargs, positions, step, config)
    new["attention_mask"] = _masks(kwargs.get("attention_mask"), step, segments, config, embeds.dtype)
    new["position_ids"] = take_last(_renumbered(positions, step), plan.index)
    if plan.index.shape[1] == plan.length and plan.full:
        return new  # every token of this call stays; only the keys before it are pruned
    new["inputs_embeds"] = take(embeds, plan.index)
    for name in PER_TOKEN:
        if isinstance(kwargs.get(name), Tensor):
            new[name] = take(kwargs[name], plan.index)
    if kwargs.get("visual_pos_masks") is not None:
        new.update(_deepstack(kwargs, plan))
    return new


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


def _packed_segments(kwargs: dict[str, Any], positions: Tensor, step: Step, config: Any) -> Tensor | None:
    """[B, K] sequence number of each kept token if the call packs several sequences into a row, else None.

    transformers sees packing in jumps of the positions when there is neither a mask nor a cache. Dropping tokens makes
    such jumps too, so it is looked for here, before, and a pruned call always has a mask.
    """
    use_cache = kwargs.get("use_cache")
    use_cache = getattr(config, "use_cache", True) if use_cache is None else use_cache
    if (
        kwargs.get("attention_mask") is not None
        or step.cache is not None
        or use_cache
        or kwargs.get("position_ids") is None
    ):
        return None
    if positions.ndim == 3:
        if positions.shape[0] == 3:
            return None  # three kinds of M-RoPE positions without text positions: transformers does not look either
        positions = positions[0]
    segments = find_packed_sequence_indices(positions)
    return None if segments is None else take_last(segments, step.plan.index)


def _masks(mask: Any, step: Step, segments: Tensor | None, config: Any, dtype: torch.dtype) -> Any:
    """The attention mask(s) of the physical call, in the form in which the unpruned one came."""
    kept = step.plan.index.shape[1]
    additive = dtype if config._attn_implementation == "eager" else None
    if segments is not None:
        if "flash" in config._attn_implementation:
            raise GripError("cannot prune a packed batch with flash attention; use sdpa or a padded batch")
        return masks.causal_4d(step.keys, kept, masks.Window(kept, 0), segments, dtype=additive)
    if isinstance(mask, dict):
        return {kind: _prepared(one, _layer_of(kind, step.cache), step, additive) for kind, one in mask.items()}
    if mask is None:
        # With a cache no mask means causal attention; without one a mask keeps gaps from being read as packing.
        return None if step.keys.full and step.cache is not None else masks.mask_2d(None, step.keys)
    if mask.ndim == 2:
        return masks.mask_2d(mask, step.keys)
    return _prepared(mask, _layer_of("full_attention", step.cache), step, additive)


def _layer_of(kind: str, cache: Cache | None) -> int:
    """A layer of the cache that uses masks of this kind."""
    if cache is None:
        return 0
    if "sliding" in kind or "chunked" in kind:
        return cache.is_sliding.index(True) if True in cache.is_sliding else 0
    return find_first_full_attention_index(cache)


def _prepared(mask: Tensor | None, layer: int, step: Step, additive: torch.dtype | None) -> Tensor | None:
    """A 4-D mask made outside the language model, for the physical call."""
    kept = step.plan.index.shape[1]
    physical = window(step.cache, kept, layer, inside=True)
    if mask is None:
        return None if step.keys.full else masks.causal_4d(step.keys, kept, physical, dtype=additive)
    if mask.ndim != 4:
        raise GripError(f"cannot prune a prepared attention mask of shape {tuple(mask.shape)}; expected 4 dimensions")
    logical = window(step.cache, step.plan.length, layer, inside=False)
    return masks.mask_4d(mask, step.plan.index, step.keys, logical, physical)


def decode_inputs(kwargs: dict[str, Any], cache: Cache, state: CacheState) -> dict[str, Any]:
    """Arguments of a one-token step on a pruned cache, with a 2-D mask or none; does as little as possible.

    Only what differs from the unpruned call is rebuilt: columns of a given mask, the mask that `generate` leaves out
    when nothing is padded although fillers are, and positions that would be counted from the physical length.
    """
    mask, new = kwargs.get("attention_mask"), {}
    if mask is None:
        if not state.full:
            new["attention_mask"] = masks.mask_2d(None, state.keys(physical_length(cache) + 1))
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
