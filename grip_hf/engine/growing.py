"""The language model's output, brought back to the length that its caller expects."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import GripError
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


def grow_output(output: Any, plan: Plan, growths: Sequence[Growth]) -> Any:
    """The output with hidden states and attention weights of the logical length.

    Args:
        output: What the language model returned.
        plan: What stayed of the call when it entered the language model.
        growths: Those of the parts of the model that see fewer positions than the caller.
    """
    if not growths:
        return output
    first = output[0]
    if first.shape[1] not in (plan.length, *(one.kept for one in growths)):
        _check_sliced(first.shape[1], plan)
        return output
    if isinstance(output, tuple):
        return (_states(output[0], growths), *output[1:])
    for name, grown in (("last_hidden_state", _states), ("hidden_states", _states), ("attentions", _weights)):
        if output.get(name) is not None:
            output[name] = grown(output[name], growths)
    return output


def _states(hidden: Any, growths: Sequence[Growth]) -> Any:
    """Hidden states [..., B, K, D], or several: each grows by its length, whichever part of the model it is from."""
    if isinstance(hidden, (tuple, list)):
        return type(hidden)(_states(one, growths) for one in hidden)
    fitting = [one for one in growths if isinstance(hidden, Tensor) and hidden.shape[-2] == one.kept]
    return fitting[0].states(hidden) if fitting else hidden


def _weights(attentions: Any, growths: Sequence[Growth]) -> Any:
    """Attention weights [B, H, K, keys] of each layer."""
    if isinstance(attentions, (tuple, list)):
        return type(attentions)(_weights(one, growths) for one in attentions)
    fitting = [one for one in growths if isinstance(attentions, Tensor) and one.fits(attentions)]
    return fitting[0].weights(attentions) if fitting else attentions


def _check_sliced(rows: int, plan: Plan) -> None:
    """Some models return only the last rows that `logits_to_keep` asks for; these must be what they seem."""
    last = torch.arange(plan.length - rows, plan.length, device=plan.index.device)
    if not bool((plan.index[:, -rows:] == last).all()):
        raise GripError(f"the language model returned its last {rows} positions, some of which were dropped")
