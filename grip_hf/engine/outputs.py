"""The language model's output, brought back to the length that its caller expects."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import GripError
from .plan import Plan, expand, source_slots


def _check_sliced(rows: int, plan: Plan) -> None:
    """Some models return only the last rows that `logits_to_keep` asks for; these must be what they seem."""
    last = torch.arange(plan.length - rows, plan.length, device=plan.index.device)
    if not bool((plan.index[:, -rows:] == last).all()):
        raise GripError(f"the language model returned its last {rows} positions, some of which were dropped")


def expand_output(output: Any, plan: Plan) -> Any:
    """The language model's output with hidden states of the logical length."""
    kept = plan.index.shape[1]
    if kept == plan.length and plan.full:
        return None
    first = output[0]
    if first.shape[1] != kept:
        _check_sliced(first.shape[1], plan)
        return None
    source = source_slots(plan)

    def grown(hidden: Any) -> Any:
        if isinstance(hidden, Tensor) and hidden.ndim == 3 and hidden.shape[1] == kept:
            return expand(hidden, source)
        if isinstance(hidden, tuple):
            return tuple(grown(one) for one in hidden)
        return hidden

    if isinstance(output, tuple):
        return (grown(output[0]), *output[1:])
    output.last_hidden_state = grown(output.last_hidden_state)
    if output.get("hidden_states") is not None:
        output.hidden_states = grown(output.hidden_states)
    return output
