"""Which words ask for which picture, while the vision tower runs: before the language model is called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..engine import upstream
from ..engine.cache import find, logical_length
from ..engine.context import CallContext, Generation, innermost
from ..engine.keepsets import group_tokens
from ..engine.reading import read_question, real_tokens
from ..errors import GripError

if TYPE_CHECKING:
    from ..engine.hooks import Boundary


def words_of(boundary: Boundary, encoder: str, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The prompt's words for each picture that an encoder is given.

    Args:
        boundary: The patch.
        encoder: The method that encodes them.
        tokens: [P] long, visual tokens that each picture makes; None if that is not known yet.

    Returns:
        text [P, T, D] and text_mask [P, T] bool; T is 0 where nobody knows a question, as when pictures are encoded by
        themselves.

    Raises:
        GripError: There are several prompts, and nothing tells which picture belongs to which.
    """
    base: Any = boundary.parts.base
    table = base.get_input_embeddings()
    context, count = innermost(), 1 if tokens is None else len(tokens)
    ids, real, past = _prompt(context)
    if context is None or ids is None:
        none = torch.zeros(count, 0, dtype=torch.bool, device=table.weight.device)
        return table.weight.new_zeros(count, 0, table.weight.shape[-1]), none
    known = torch.tensor(boundary.parts.token_ids, device=ids.device)
    visual = torch.isin(ids, known)
    question = read_question(context, visual, real_tokens(real, past, visual), first=past == 0)
    texts = group_tokens(question.text, question.turn)
    own = ids == known[upstream.ENCODERS.index(encoder)] if len(known) == len(upstream.ENCODERS) else visual
    own = own if bool(own.any()) else visual  # videos may have the placeholders of pictures
    keys = question.turn + (int(question.turn.max()) + 1) * torch.arange(len(ids), device=ids.device)[:, None]
    asked = keys[own]
    if tokens is None:
        if len(asked.unique()) > 1:
            raise GripError(
                "the tower scorer cannot tell whose picture is whose in a batch of several prompts of this family; "
                "give one at a time, or a tower_selector that does not read the question"
            )
        starts = torch.zeros(1, dtype=torch.long, device=ids.device)
    else:
        # In a later turn of a conversation the pictures of earlier ones are in the prompt alone.
        earlier = len(asked) - int(tokens.sum())
        if earlier < 0:
            raise GripError(f"pictures make {int(tokens.sum())} visual tokens, but the prompts have {len(asked)}")
        starts = tokens.cumsum(0) - tokens + earlier
    words, place = keys[texts.row, texts.place[:, 0]], texts.place
    match = asked[starts.to(asked.device)][:, None] == words[None]
    first = match.byte().argmax(1) if match.numel() else torch.zeros(count, dtype=torch.long)
    text_mask = texts.mask[first] & match.any(1, keepdim=True)
    picked = ids[texts.row[:, None], place][first].masked_fill(~text_mask, 0)
    return table(picked).masked_fill(~text_mask[..., None], 0), text_mask


def _prompt(context: CallContext | None) -> tuple[Tensor | None, Tensor | None, int]:
    """Ids [B, L] of the prompt, its attention mask, and how many positions are cached before it."""
    if isinstance(context, Generation):
        return context.prompt_ids, context.prompt_mask, 0
    arguments = {} if context is None else context.arguments or {}
    return arguments.get("input_ids"), arguments.get("attention_mask"), logical_length(find(arguments))
