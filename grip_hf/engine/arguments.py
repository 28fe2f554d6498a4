"""Rewrite the arguments of one language-model call for what stays of it. Nothing is changed in place.

A call brings its attention mask in one of a few forms, and each has one way to be pruned:

    packed rows, or a sliding window that the sequence outgrows      BUILT   from scratch, in original positions
    a prepared 4-D mask, or several by kind of layer                 PICKED  rows and columns of what was given
    no mask, nothing padded, a cache                                 NONE    still causal attention
    anything else                                                    PADDING [B, keys], zero at padding and fillers

Sliding windows count positions of the *unpruned* sequence, whichever cache or mask the model uses.
"""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor

from ..errors import GripError
from . import masks, upstream
from .cache import physical, window
from .call import Call, Step
from .masks import KeyMap, Window
from .plan import Plan, take, take_last

Form = enum.Enum("Form", ["NONE", "PADDING", "PICKED", "BUILT"])


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


def compact_positions(position_ids: Tensor, keep: Tensor, real: Tensor) -> Tensor:
    """Re-number positions as if the dropped ones had never been there.

    Args:
        position_ids: [B or 1, L] positions of the whole call.
        keep: [B, L] bool, what stays.
        real: [B, L] bool, False at padding (whose loss shifts nothing).

    Returns:
        [B, L] new positions, meaningful where `keep`.
    """
    gone = (real & ~keep).to(position_ids.dtype)
    return position_ids - (gone.cumsum(1) - gone)


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


def attention_masks(step: Step) -> Any:
    """The mask(s) of the physical call: None, 2-D, 4-D, or a dict of such by kind of layer."""
    call = step.call
    segments = call.segments
    _refuse(step, segments)
    form = form_of(step, segments)
    if form is Form.NONE:
        return None
    if form is Form.PADDING:
        return masks.mask_2d(call.mask, step.keys)
    if form is Form.BUILT:
        return _built(step, segments)
    if not isinstance(call.mask, dict):
        return _picked(upstream.FULL, call.mask, step)
    return {kind: _picked(kind, mask, step) for kind, mask in call.mask.items()}


def form_of(step: Step, segments: Tensor | None) -> Form:
    """Which form the mask of the physical call takes; `segments` as in `Call`."""
    call = step.call
    if segments is not None:
        return Form.BUILT
    if isinstance(call.mask, dict) or (call.mask is not None and call.mask.ndim != 2):
        return Form.PICKED
    if cuts_static_keys(call):
        return Form.PADDING
    if outgrows_window(call.config, call.past_logical + step.plan.length):
        return Form.BUILT
    # With a cache no mask means causal attention; without one a mask keeps gaps from being read as packing.
    return Form.NONE if call.mask is None and step.keys.full and call.cache is not None else Form.PADDING


def outgrows_window(config: Any, length: int) -> bool:
    """Whether the model has sliding windows that `length` positions outgrow."""
    reach = upstream.sliding_window(config)
    return reach is not None and length > reach


def cuts_static_keys(call: Call) -> bool:
    """Whether attention tells the filled part of a static cache from the length of a 2-D mask, as flash does."""
    return call.cache is not None and call.cache.is_compileable and uses_flash(call.config)


def uses_flash(config: Any) -> bool:
    """Whether the language model's attention kernel is a flash attention."""
    return "flash" in upstream.attention_kernel(config)


def _refuse(step: Step, segments: Tensor | None) -> None:
    """Refuse what would leak: into the state that recurrent layers carry on, or past what flash attention can tell."""
    call = step.call
    if upstream.is_recurrent(call.config):
        if segments is not None:
            raise GripError(
                "cannot prune a packed batch with recurrent layers (convolution, linear attention), whose state would "
                "run on from one sequence into the next; use a padded batch"
            )
        if call.past and not step.plan.full:
            raise GripError(
                "cannot keep different numbers of tokens per row in a later call on a cache with recurrent layers "
                "(convolution, linear attention): fillers would change their state; give one row at a time, or use "
                "`with model.grip.disabled()`"
            )
    if segments is not None and uses_flash(call.config):
        raise GripError("cannot prune a packed batch with flash attention; use sdpa or a padded batch")


def _additive(call: Call) -> torch.dtype | None:
    """The dtype of an additive mask, where the kernel takes one; None for a bool mask."""
    return call.embeds.dtype if upstream.attention_kernel(call.config) == "eager" else None


def _windows(kind: str, step: Step) -> tuple[Window, Window]:
    """The logical and the physical keys that the mask for layers of a kind covers."""
    cache, view = step.call.cache, physical(step.call.cache)
    layer = 0
    if cache is not None:
        found = upstream.first_layer(cache, sliding="sliding" in kind or "chunked" in kind)
        layer = 0 if found is None else found
    return window(cache, step.plan.length, layer), window(view, step.kept, layer)


def _built(step: Step, segments: Tensor | None) -> Any:
    """Masks from scratch: causal, within packed sequences, within windows in original positions."""
    call, keys = step.call, step.keys
    own = None if segments is None else take_last(segments, step.plan.index)
    if not outgrows_window(call.config, call.past_logical + step.plan.length):
        return masks.causal_4d(keys, step.kept, Window(step.kept, 0), own, dtype=_additive(call))
    reach = upstream.sliding_window(call.config)
    if uses_flash(call.config):
        raise GripError(
            f"cannot prune {call.past_logical + step.plan.length} positions with flash attention and a sliding window "
            f"of {reach}: it would count kept tokens only; use sdpa"
        )
    if call.mask is not None:
        keys = KeyMap(keys.index, masks.mask_2d(call.mask, keys) != 0, full=False)
    made = {
        kind: masks.causal_4d(keys, step.kept, _windows(kind, step)[1], own, within, _additive(call))
        for kind, within in ((upstream.FULL, None), (upstream.SLIDING, reach))
    }
    return made if getattr(call.config, "layer_types", None) is not None else made[upstream.SLIDING]


def _picked(kind: str, mask: Tensor | None, step: Step) -> Tensor | None:
    """One prepared mask, that of the layers of a kind, for the physical call."""
    if kind in upstream.RECURRENT:
        return _own_tokens(mask, step.plan)
    if (mask is not None and mask.ndim == 2) or (mask is None and cuts_static_keys(step.call)):
        return masks.mask_2d(mask, step.keys)
    logical, present = _windows(kind, step)
    if mask is None:
        return None if step.keys.full else masks.causal_4d(step.keys, step.kept, present, dtype=_additive(step.call))
    if mask.ndim != 4 or mask.shape[2] != step.plan.length:
        raise GripError(
            f"cannot prune a prepared attention mask of shape {tuple(mask.shape)}; expected [batch, heads, "
            f"{step.plan.length}, keys]"
        )
    return masks.mask_4d(mask, step.plan.index, step.keys, logical, present)


def _own_tokens(mask: Tensor | None, plan: Plan) -> Tensor | None:
    """[B, K] mask of a recurrent layer, from that of the unpruned call, [B, L]."""
    if mask is None:
        return None if plan.full else plan.valid.long()
    return take(mask, plan.index) * plan.valid.to(mask.dtype)


def flash_arguments(mask: Any, positions: Tensor, step: Step) -> dict[str, Any]:
    """Extra arguments that keep flash attention from reading the gaps of one sequence's positions as packing.

    Args:
        mask: attention mask(s) of the physical call.
        positions: its position ids, last dims [B, K].
        step: what stays.
    """
    batch, kept = step.plan.index.shape
    if not uses_flash(step.call.config) or batch > 1 or not step.keys.full or isinstance(mask, dict):
        return {}
    if mask is not None and not bool(mask.all()):
        return {}
    keys, device = step.keys.index.shape[1], step.keys.index.device
    if upstream.is_recurrent(step.call.config) and positions.ndim == 3:
        # Recurrent layers take lengths for packing. But the first of four kinds of M-RoPE positions only tells whether
        # there is any, so it can be counted without gaps; three kinds are not looked at.
        text = torch.arange(keys - kept, keys, device=device).expand(1, batch, -1)
        return {"position_ids": torch.cat([text, positions[1:]])} if len(positions) == 4 else {}
    return {
        "cu_seq_lens_q": torch.tensor([0, kept], dtype=torch.int32, device=device),
        "cu_seq_lens_k": torch.tensor([0, keys], dtype=torch.int32, device=device),
        "max_length_q": kept,
        "max_length_k": keys,
    }
