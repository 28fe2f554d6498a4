"""Which positions of one call stay, and how its hidden states get their length back.

Pure tensor functions. Lengths are *logical* (L: the sequence as the caller sees it) or *physical* (K: what is left of
it). Rows that keep fewer positions than others are filled up on the left; fillers are marked invalid and masked out.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which positions of one call stay.

    Attributes:
        index: [B, K] long, the logical position behind each physical slot; rising where `valid`.
        valid: [B, K] bool, False at fillers, which lie on the left.
        length: L, the logical length.
        full: True if every slot is valid.
    """

    index: Tensor
    valid: Tensor
    length: int
    full: bool


def make_plan(keep: Tensor) -> Plan:
    """Plan a call that keeps the True positions of `keep` [B, L] bool in their order."""
    counts = keep.sum(1).tolist()
    kept = max(counts)
    # Stable: positions that go come first, both parts in their order; the last K slots hold all that stays.
    order = keep.byte().argsort(dim=1, stable=True)[:, keep.shape[1] - kept :]
    return Plan(order, keep.gather(1, order), keep.shape[1], full=min(counts) == kept)


def identity_plan(batch: int, length: int, device: torch.device) -> Plan:
    """Plan a call that keeps everything."""
    index = torch.arange(length, device=device).expand(batch, -1)
    return Plan(index, torch.ones_like(index, dtype=torch.bool), length, full=True)


def take(values: Tensor, index: Tensor) -> Tensor:
    """Pick positions along dim 1: `values` [B or 1, L, ...] and `index` [B, K] give [B, K, ...]."""
    if values.shape[0] != index.shape[0]:
        values = values.expand(index.shape[0], *values.shape[1:])
    rows = torch.arange(index.shape[0], device=index.device)[:, None]
    return values[rows, index]


def take_last(values: Tensor, index: Tensor) -> Tensor:
    """Pick positions along the last dim: `values` [..., B or 1, L] or [L] and `index` [B, K] give [..., B, K]."""
    if values.ndim == 1:
        values = values[None]
    lead = values.shape[:-2]
    values = values.expand(*lead, index.shape[0], values.shape[-1])
    return values.gather(-1, index.expand(*lead, *index.shape))


def source_slots(plan: Plan) -> Tensor:
    """[B, L] long: the physical slot that stands for each logical position.

    A dropped position takes the slot of the last kept one before it, because the token after a dropped run is
    predicted from there; positions before the first kept one take the first valid slot.
    """
    batch, kept = plan.index.shape
    slots = torch.where(plan.valid, torch.arange(kept, device=plan.index.device), 0)
    source = slots.new_zeros(batch, plan.length).scatter(1, plan.index, slots).cummax(1).values
    return source.maximum(plan.valid.byte().argmax(1, keepdim=True))


def expand(hidden: Tensor, source: Tensor, dim: int = 1) -> Tensor:
    """Bring `hidden` back to the logical length along the dimension of tokens; the batch is the one before it.

    Args:
        hidden: [..., B, K, ...], with K at `dim`.
        source: [B, L] long, see `source_slots`.
        dim: Where the tokens are, >= 1 or negative.
    """
    dim = dim % hidden.ndim
    moved = hidden.movedim((dim - 1, dim), (0, 1))
    return take(moved, source).movedim((0, 1), (dim - 1, dim))


def then(first: Plan | None, second: Plan) -> Plan:
    """The plan that does what `second` does to what `first` left."""
    if first is None:
        return second
    return Plan(first.index.gather(1, second.index), second.valid, first.length, second.full)


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
