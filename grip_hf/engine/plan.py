"""Which positions of one call stay, and how what the language model puts out gets its length back.

Pure tensor functions, up to `grow_output`. Lengths are *logical* (L: the sequence as the caller sees it) or *physical*
(K: what is left of it). Rows that keep fewer positions than others are filled up on the left; fillers are marked
invalid and masked out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import GripError
from . import upstream
from .masks import KeyMap


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


@dataclasses.dataclass(frozen=True)
class Growth:
    """How what has one length gets the logical one.

    Attributes:
        kept: The physical length.
        source: [B, L] long, the slot that stands for each logical position.
        keys: All keys of the layers concerned, in logical terms.
        total: Logical number of keys.
    """

    kept: int
    source: Tensor
    keys: KeyMap
    total: int

    def states(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., B, L, D] from [..., B, K, D]; a dropped position has those of the kept one before it."""
        return expand(hidden, self.source, -2)

    def flat(self, logits: Tensor) -> Tensor:
        """Router logits [B * L, E] from [B * K, E]."""
        return self.states(logits.view(-1, self.kept, logits.shape[-1])).flatten(0, 1)

    def fits(self, attention: Tensor) -> bool:
        """Whether attention weights are those of a layer that sees all keys."""
        return attention.ndim == 4 and attention.shape[2:] == (self.kept, self.keys.index.shape[1])

    def weights(self, attention: Tensor) -> Tensor:
        """Attention weights [B, H, L, logical keys] from [B, H, K, keys]; nothing attends to dropped positions."""
        rows = expand(attention.transpose(1, 2), self.source).transpose(1, 2)
        seen = rows * self.keys.valid[:, None, None].to(rows.dtype)
        index = self.keys.index[:, None, None].expand_as(seen)
        return seen.new_zeros(*seen.shape[:3], self.total).scatter_add(3, index, seen)


def growths(
    plan: Plan, keys: KeyMap, total: int, later: Mapping[int, tuple[Plan, KeyMap]]
) -> dict[int, Growth | None]:
    """From the layer of each number on, how what it puts out gets the length of the call.

    Args:
        plan: What stays of the call.
        keys: All physical keys that it sees, in logical terms.
        total: Logical number of keys.
        later: What is left from the layer of each number on, and all keys that it sees, if tokens are dropped between
            layers.
    """
    found = {0: growth(plan, keys, total)}
    for start, (left, seen) in later.items():
        found[start] = growth(left, seen, total)
    return found


def growth(plan: Plan, keys: KeyMap, total: int) -> Growth | None:
    """How the output of a call with this plan grows back, or None if it has its length."""
    kept = plan.index.shape[1]
    if kept == plan.length and plan.full:
        return None
    return Growth(kept, source_slots(plan), keys, total)


def grow_output(output: Any, plan: Plan, growths: Mapping[int, Growth | None], between: bool) -> Any:
    """The output with hidden states and attention weights of the logical length.

    Args:
        output: What the language model returned.
        plan: What stayed of the call when it entered the language model.
        growths: From the layer of each number on, how what it puts out grows back; None where it has its length.
        between: Whether tokens were dropped between the layers. Then the hidden states between them have their length.
    """
    if not any(growths.values()):
        return output
    first = output[0]
    entered = None if between else growths[0]
    if first.shape[1] not in (plan.length, plan.length if entered is None else entered.kept):
        _check_sliced(first.shape[1], plan)
        return output
    if entered is not None:
        if isinstance(output, tuple):
            return (_states(output[0], entered), *output[1:])
        output["last_hidden_state"] = _states(output["last_hidden_state"], entered)
        if output.get("hidden_states") is not None:
            output["hidden_states"] = _states(output["hidden_states"], entered)
        if _recorded(output, upstream.ROUTER_LOGITS):
            routed = output[upstream.ROUTER_LOGITS]
            output[upstream.ROUTER_LOGITS] = type(routed)(entered.flat(one) for one in routed)
    elif (entering := growths.get(0)) is not None and _recorded(output, "hidden_states"):
        # What entered the first layer is recorded as that layer got it.
        incoming, *later = output["hidden_states"]
        output["hidden_states"] = type(output["hidden_states"])((_states(incoming, entering), *later))
    if _recorded(output, "attentions"):
        output["attentions"] = _weights(output["attentions"], growths)
    return output


def _recorded(output: Any, name: str) -> bool:
    """Whether an output has a value for each layer."""
    return not isinstance(output, tuple) and isinstance(output.get(name), (tuple, list))


def _states(hidden: Any, growth: Growth) -> Any:
    """Hidden states [..., B, K, D], or several, of those that have the physical length."""
    if isinstance(hidden, (tuple, list)):
        return type(hidden)(_states(one, growth) for one in hidden)
    return growth.states(hidden) if isinstance(hidden, Tensor) and hidden.shape[-2] == growth.kept else hidden


def _weights(attentions: Any, growths: Mapping[int, Growth | None]) -> Any:
    """Attention weights [B, H, K, keys] of each layer."""
    grown, growth = [], None
    for layer, weights in enumerate(attentions):
        growth = growths.get(layer, growth)
        fits = growth is not None and isinstance(weights, Tensor) and growth.fits(weights)
        grown.append(growth.weights(weights) if growth is not None and fits else weights)
    return type(attentions)(grown)


def _check_sliced(rows: int, plan: Plan) -> None:
    """Some models return only the last rows that `logits_to_keep` asks for; these must be what they seem."""
    last = torch.arange(plan.length - rows, plan.length, device=plan.index.device)
    if not bool((plan.index[:, -rows:] == last).all()):
        raise GripError(f"the language model returned its last {rows} positions, some of which were dropped")
