"""The loss that balances the experts of a model, over the tokens that stay.

A model computes it from the router logits of every token and the mask that it was itself given, after the language
model's call. So the call gets a mask of its own, on which the dropped tokens are marked once they are known; the
router logits grow back to the length of that mask. That is the loss of the unpatched model with these tokens masked
out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import GripError
from . import upstream

if TYPE_CHECKING:
    from .call import Step


def own_mask(given: dict[str, Any], inside: bool) -> Tensor:
    """A copy of the mask of a call, [B, past + L], to mark dropped tokens on.

    Args:
        given: What the model is called with, by name.
        inside: Whether tokens are dropped between layers.

    Raises:
        GripError: No such mask would count the tokens that stay.
    """
    mask, ids = given.get("attention_mask"), given.get("input_ids")
    if inside:
        raise GripError(
            "cannot prune a call with output_router_logits=True between the layers: the router loss takes one mask "
            "for all of them; train with output_router_logits=False, or with another selector"
        )
    if mask is None and given.get("position_ids") is None:
        tokens = given["inputs_embeds"] if ids is None else ids
        return torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise GripError(
            "cannot prune a call with output_router_logits=True without an attention_mask of shape [batch, length], "
            f"got {type(mask).__name__}: the router loss counts the tokens by it"
        )
    return mask.clone()


def refuse_without_owner(config: Any, given: dict[str, Any]) -> None:
    """Refuse a call whose router loss, if there is one, nobody gives a mask.

    Raises:
        GripError: It asks for router logits.
    """
    if upstream.router_loss(config, given):
        raise GripError(
            "cannot prune a call of the base model, or of `forward`, with output_router_logits=True, since a router "
            "loss would count dropped tokens; call the model itself, or with output_router_logits=False"
        )


def mark_dropped(mask: Tensor, step: Step) -> None:
    """Mark on the mask of a call that tokens were dropped, in place."""
    held = step.keep & step.call.real
    mask[:, -held.shape[1] :].mul_(held.to(mask))
