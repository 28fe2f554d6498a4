"""The language model's output, brought back to the length that its caller expects."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import GripError
from . import upstream
from .masks import KeyMap
from .plan import Plan, expand, source_slots


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
