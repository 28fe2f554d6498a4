"""The attention mask of a pruned call, in the form in which the language model takes it.

Sliding windows count positions of the *unpruned* sequence, whichever cache or mask the model uses.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import find_packed_sequence_indices

from ..errors import GripError
from . import masks
from .cache import CacheState, window
from .masks import KeyMap
from .plan import Plan, take, take_last
from .upstream import attention_kernel, find_cache

# Layers that carry a state from token to token; their mask is that of the call's own tokens, [B, L], or None.
RECURRENT = ("linear_attention", "conv")


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


def attention_masks(kwargs: dict[str, Any], positions: Tensor, step: Step, config: Any) -> Any:
    """The mask(s) of the physical call: None, 2-D, 4-D, or a dict of such.

    Args:
        kwargs: arguments of the unpruned call.
        positions: its position ids.
        step: what stays.
        config: the language model's config.
    """
    mask, dtype = kwargs.get("attention_mask"), kwargs["inputs_embeds"].dtype
    kept = step.plan.index.shape[1]
    additive = dtype if attention_kernel(config) == "eager" else None
    segments = _packed_segments(kwargs, positions, step, config)
    if is_recurrent(config):
        _check_recurrent(segments, step)
    if segments is not None:
        if _uses_flash(config):
            raise GripError("cannot prune a packed batch with flash attention; use sdpa or a padded batch")
        if needs_windows(config, step.plan.length):
            return _windowed(None, step, config, additive, segments)
        return masks.causal_4d(step.keys, kept, masks.Window(kept, 0), segments, dtype=additive)
    if isinstance(mask, dict):
        return {kind: _of_kind(kind, one, step, config, additive) for kind, one in mask.items()}
    if cuts_static_keys(config, step.cache):
        return masks.mask_2d(mask, step.keys)
    if mask is not None and mask.ndim != 2:
        return _prepared(mask, _layer_of("full_attention", step.cache), step, additive)
    if needs_windows(config, step.past_logical + step.plan.length):
        return _windowed(mask, step, config, additive)
    if mask is not None:
        return masks.mask_2d(mask, step.keys)
    # With a cache no mask means causal attention; without one a mask keeps gaps from being read as packing.
    return None if step.keys.full and step.cache is not None else masks.mask_2d(None, step.keys)


def is_recurrent(config: Any) -> bool:
    """Whether the language model has layers that carry a state from token to token."""
    return any(kind in RECURRENT for kind in getattr(config, "layer_types", None) or ())


def _check_recurrent(segments: Tensor | None, step: Step) -> None:
    """Refuse what would leak into the state that recurrent layers carry on."""
    if segments is not None:
        raise GripError(
            "cannot prune a packed batch with recurrent layers (convolution, linear attention), whose state would run "
            "on from one sequence into the next; use a padded batch"
        )
    if step.past and not step.plan.full:
        raise GripError(
            "cannot keep different numbers of tokens per row in a later call on a cache with recurrent layers "
            "(convolution, linear attention): fillers would change their state; give one row at a time, or use "
            "`with model.grip.disabled()`"
        )


def _of_kind(kind: str, mask: Tensor | None, step: Step, config: Any, additive: torch.dtype | None) -> Tensor | None:
    """One of several masks, that of the layers of a kind."""
    if kind in RECURRENT:
        return _own_tokens(mask, step.plan)
    if cuts_static_keys(config, step.cache):
        return masks.mask_2d(mask, step.keys)
    return _prepared(mask, _layer_of(kind, step.cache), step, additive)


def _own_tokens(mask: Tensor | None, plan: Plan) -> Tensor | None:
    """[B, K] mask of a recurrent layer, from that of the unpruned call, [B, L]."""
    if mask is None:
        return None if plan.full else plan.valid.long()
    return take(mask, plan.index) * plan.valid.to(mask.dtype)


def cuts_static_keys(config: Any, cache: Cache | None) -> bool:
    """Whether attention tells the filled part of a static cache from the length of a 2-D mask, as flash does."""
    return cache is not None and cache.is_compileable and _uses_flash(config)


def needs_windows(config: Any, length: int) -> bool:
    """Whether the model has sliding windows that `length` positions outgrow."""
    reach = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None)
    return reach is not None and length > reach and (layers is None or "sliding_attention" in layers)


def _windowed(
    mask: Tensor | None, step: Step, config: Any, additive: torch.dtype | None, segments: Tensor | None = None
) -> Any:
    """Masks of a model that makes its own from a 2-D one, with windows in original positions."""
    if _uses_flash(config):
        raise GripError(
            f"cannot prune {step.past_logical + step.plan.length} positions with flash attention and a sliding window "
            f"of {config.sliding_window}: it would count kept tokens only; use sdpa"
        )
    keys, kept = step.keys, step.plan.index.shape[1]
    if mask is not None:
        keys = KeyMap(keys.index, masks.mask_2d(mask, keys) != 0, full=False)
    made = {
        kind: masks.causal_4d(
            keys, kept, window(step.cache, kept, _layer_of(kind, step.cache), inside=True), segments, reach, additive
        )
        for kind, reach in (("full_attention", None), ("sliding_attention", config.sliding_window))
    }
    return made if getattr(config, "layer_types", None) is not None else made["sliding_attention"]


def _packed_segments(kwargs: dict[str, Any], positions: Tensor, step: Step, config: Any) -> Tensor | None:
    """[B, K] sequence number of each kept token if the call packs several sequences into a row, else None.

    transformers sees packing in jumps of the positions when there is neither a mask nor a cache. Dropping tokens makes
    such jumps too, so it is looked for here, before, and a pruned call always has a mask.
    """
    if kwargs.get("attention_mask") is not None or not _may_be_packed(kwargs, config):
        return None
    if positions.ndim == 3:
        if positions.shape[0] == 3:
            return None  # three kinds of M-RoPE positions without text positions: transformers does not look either
        positions = positions[0]
    segments = find_packed_sequence_indices(positions)
    return None if segments is None else take_last(segments, step.plan.index)


def _may_be_packed(kwargs: dict[str, Any], config: Any) -> bool:
    """Whether transformers looks for packing in a call without a mask."""
    use_cache = kwargs.get("use_cache")
    use_cache = getattr(config, "use_cache", True) if use_cache is None else use_cache
    return not use_cache and find_cache(kwargs) is None and kwargs.get("position_ids") is not None


def refuse_mixed_rows(kwargs: dict[str, Any], config: Any) -> None:
    """Refuse a call without a mask whose model makes one that mixes the sequences packed into a row."""
    if kwargs.get("attention_mask") is None or not _may_be_packed(kwargs, config):
        return
    positions = kwargs["position_ids"]
    if positions.ndim == 2 and find_packed_sequence_indices(positions) is not None:
        raise GripError(
            "cannot prune a packed batch of this model: its own attention mask does not keep the sequences of a row "
            "apart; use a padded batch"
        )


def _layer_of(kind: str, cache: Cache | None) -> int:
    """A layer of the cache that uses masks of this kind."""
    if cache is None:
        return 0
    if "sliding" in kind or "chunked" in kind:
        return cache.is_sliding.index(True) if True in cache.is_sliding else 0
    names = ("is_sliding", "is_linear", "is_dummy")  # the last two came with transformers 5.23
    kinds = itertools.zip_longest(*(getattr(cache, name, ()) for name in names), fillvalue=False)
    full = [not any(kind) for kind in kinds]
    return full.index(True) if True in full else 0


def _prepared(mask: Tensor | None, layer: int, step: Step, additive: torch.dtype | None) -> Tensor | None:
    """A 4-D mask made outside the language model, for the physical call."""
    kept = step.plan.index.shape[1]
    physical = window(step.cache, kept, layer, inside=True)
    if mask is None:
        return None if step.keys.full else masks.causal_4d(step.keys, kept, physical, dtype=additive)
    if mask.ndim == 2:
        return masks.mask_2d(mask, step.keys)
    if mask.ndim != 4:
        raise GripError(f"cannot prune a prepared attention mask of shape {tuple(mask.shape)}; expected 4 dimensions")
    logical = window(step.cache, step.plan.length, layer, inside=False)
    return masks.mask_4d(mask, step.plan.index, step.keys, logical, physical)


def _uses_flash(config: Any) -> bool:
    return "flash" in attention_kernel(config)


def flash_arguments(mask: Any, positions: Tensor, step: Step, config: Any) -> dict[str, Any]:
    """Extra arguments that keep flash attention from reading the gaps of one sequence's positions as packing.

    Args:
        mask: attention mask(s) of the physical call.
        positions: its position ids, last dims [B, K].
        step: what stays.
        config: the language model's config.
    """
    batch, kept = step.plan.index.shape
    if not _uses_flash(config) or batch > 1 or not step.keys.full or isinstance(mask, dict):
        return {}
    if mask is not None and not bool(mask.all()):
        return {}
    keys, device = step.keys.index.shape[1], step.keys.index.device
    if is_recurrent(config) and positions.ndim == 3:
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
