"""Which visual tokens of a call still have rows, where the vision tower dropped some."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine.budget import Budget
from ..engine.call import Call
from ..engine.context import CallContext
from ..engine.keepsets import spread_taps
from ..engine.taps import attached_taps
from ..engine.upstream import ENCODERS, encoded_outputs
from ..errors import GripError
from .rows import drops_rows

PREFIX = "tower."


def tap_of(encoder: str) -> str:
    """The tap [visual tokens] bool that says which tokens of an encoder's pictures have rows; none for all of them."""
    return PREFIX + encoder


def survivors(context: CallContext, call: Call, budget: Budget) -> Tensor | None:
    """[B, L] bool: the visual tokens that have rows, or None if all do.

    Raises:
        GripError: The vision tower drops rows, and of these pictures it is not known which.
    """
    taps = context.taps.joined()
    for output in encoded_outputs(context.arguments or {}):
        for name, tap in attached_taps(output).items():
            taps[name] = torch.cat([taps[name], tap]) if name in taps else tap
    found = [(encoder, taps[tap_of(encoder)]) for encoder in ENCODERS if tap_of(encoder) in taps]
    if not found:
        if drops_rows(budget):
            raise GripError(
                "tower_keep_ratio drops rows of the vision tower, and which of these pictures' were is not known: "
                "they were encoded before the model was patched, or a prefill was cut into chunks; give pixels, and "
                "prefill_chunk_size=None"
            )
        return None
    alive = call.visual.clone()
    for encoder, tap in found:
        if len(tap):
            mine = call.visual if len(found) == 1 else _tokens_of(encoder, context, call)
            alive = torch.where(mine, spread_taps(tap.to(mine.device), mine, tap_of(encoder)), alive)
    return None if torch.equal(alive, call.visual) else alive


def _tokens_of(encoder: str, context: CallContext, call: Call) -> Tensor:
    """[B, L] bool: the tokens of the pictures, or of the videos, of a call that has both."""
    ids, known = (context.arguments or {}).get("input_ids"), context.boundary.parts.token_ids
    if ids is None or len(known) != len(ENCODERS):
        raise GripError("pictures and videos in one call need token ids where the vision tower drops rows")
    return call.visual & (ids.to(call.visual.device) == known[ENCODERS.index(encoder)])
