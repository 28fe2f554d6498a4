"""Attention of some tokens to all tokens in one decoder layer, from the layer's own queries and keys.

The layer's attention module runs once more on a shallow copy of itself whose config names an attention function of
ours. That function sees queries and keys as any attention kernel does, after the model's own projections, norms and
rotary embedding, and stops there. So nothing of any model's attention is written again here.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from . import upstream

NAME = "grip_hf_ranking"


class Ranked(Exception):
    """What the attention function found.

    Args:
        weights: [B, Q, L] float32, attention of each asking token to every token, averaged over heads.
    """

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights


class _Config:
    """A config that names our attention function, and is the model's own otherwise."""

    def __init__(self, config: Any) -> None:
        self._own = config
        setattr(self, upstream.KERNEL, NAME)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


def attention_of(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    asking: Tensor,
    index: Tensor,
    earlier: int = 0,
) -> Tensor:
    """Attention of the asking tokens to those of the call, averaged over heads.

    Args:
        module: The attention module.
        args: Its arguments, positional
        kwargs: and by name, as the layer gives them, its mask included.
        asking: [B, Q] long, the slots of the asking tokens in this call.
        index: [B, L] long, the original position of each slot, for sliding windows.
        earlier: Keys that the cache holds before those of the call; they take their part of each head's weight.

    Returns:
        [B, Q, L] float32.

    Raises:
        UnsupportedModelError: The module does not come by its attention function through its config.
    """
    probe = copy.copy(module)
    probe.config = _Config(module.config)  # type: ignore[assignment]
    probe._grip_asking = (asking, index, earlier)  # type: ignore[assignment]  # on the copy, which nobody else sees
    try:
        type(module).forward(probe, *args, **upstream.only_read(kwargs, earlier > 0))
    except Ranked as ranked:
        return ranked.weights[..., earlier:]
    raise upstream.unknown(f"{type(module).__name__} does not take its attention function from its config")


@torch.no_grad()
def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """An attention function for transformers' registry; query [B, H, L, C], key [B, H', L, C]."""
    asking, index, earlier = module._grip_asking
    rows = asking[:, None, :, None]
    asked = query.gather(2, rows.expand(-1, query.shape[1], -1, query.shape[3])).float()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).float()
    logits = asked @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.masked_fill(
        ~_seen(attention_mask, asking, index, earlier, sliding_window), torch.finfo(logits.dtype).min
    )
    if s_aux is not None:  # an attention sink takes its part of each head's weight
        sinks = s_aux.float().reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sinks], -1)
    raise Ranked(logits.softmax(-1)[..., : key.shape[2]].mean(1))


def _seen(mask: Tensor | None, asking: Tensor, index: Tensor, earlier: int, reach: int | None) -> Tensor:
    """[B, H or 1, Q, earlier + L] bool: which keys each asking token sees."""
    length = earlier + index.shape[1]
    if mask is not None and mask.ndim == 4:
        mask = mask[..., :length].expand(len(asking), -1, -1, -1)
        rows = mask.gather(2, asking[:, None, :, None].expand(-1, mask.shape[1], -1, length))
        return rows if rows.dtype == torch.bool else rows > torch.finfo(rows.dtype).min / 2
    slots = torch.arange(length, device=asking.device)
    seen = slots <= asking[..., None] + earlier
    if mask is not None:
        seen = seen & (mask[:, None, -length:] != 0)
    if reach is not None:  # only where the cache holds nothing
        seen = seen & (index[:, None] > index.gather(1, asking)[..., None] - reach)
    return seen[:, None]


def register() -> None:
    """Make our attention function known to transformers, under a name that no config has; once or many times."""
    AttentionInterface.register(NAME, _attend)
