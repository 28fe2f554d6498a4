"""Which text is the prompt, so that what is kept never hangs on an answer that the call has too.

In this order: what `with model.grip.prompt(...)` says; the labels given to the model; what `generate` was given; what
the callers hold (see `callers`). A call of which nothing of this is known is prompt as a whole. `logits_to_keep` says
nothing about it.

A conversation with several answers runs as it would on one KV cache: a picture is chosen, within a budget of its own,
by the text of the turn that it comes in, which ends where the next answer begins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .callers import IGNORED, answer_of_callers, has_unpruned_reference
from .context import CallContext, prompt_of_generation

# A stack of (owner, prompt), so that several models may be told at once; private to each thread and task.
_told: ContextVar[tuple[tuple[object, Tensor | Sequence[int]], ...]] = ContextVar("grip_prompts", default=())


UNPRUNED = (
    "the trainer compares a patched model with a reference model that sees all visual tokens; prune that one too: "
    "trainer.add_callback(grip_hf.training.PruneReference(trainer))"
)

ALL_ANSWER = (
    "the labels of a training call cover all text of a picture's turn, so that the answer, too, chooses its visual "
    "tokens; put -100 at the prompt (TRL: assistant_only_loss=True or completion_only_loss=True), or say where the "
    "prompt is: `with model.grip.prompt(mask_or_lengths): ...`"
)


@dataclasses.dataclass(frozen=True)
class Question:
    """What a call asks.

    Attributes:
        text: [B, L] bool, the tokens of the prompt that are neither padding nor visual.
        turn: [B, L] long, which turn each position belongs to.
    """

    text: Tensor
    turn: Tensor


@contextmanager
def told(owner: object, prompt: Tensor | Sequence[int]) -> Iterator[None]:
    """Within the block, calls of the model that `owner` belongs to have this prompt (see `GripHandle.prompt`)."""
    if not isinstance(prompt, Tensor):
        lengths = list(prompt) if isinstance(prompt, Sequence) and not isinstance(prompt, str) else []
        if not lengths or not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in lengths):
            raise ConfigError(f"prompt must be a mask [B, L] or a list of lengths >= 0, got {prompt!r}")
    elif prompt.ndim != 2 or prompt.is_floating_point():
        raise ConfigError(
            f"prompt must be a mask [B, L] of bools or integers, got {prompt.dtype} {tuple(prompt.shape)}"
        )
    token = _told.set((*_told.get(), (owner, prompt)))
    try:
        yield
    finally:
        _told.reset(token)


def labels_of(given: Mapping[str, Any]) -> Tensor | None:
    """[B, L] the labels of a call, if it has any; also where each position is given the label of the next one."""
    labels, shifted = given.get("labels"), given.get("shift_labels")
    if labels is not None or not isinstance(shifted, Tensor) or shifted.ndim != 2:
        return labels
    return torch.nn.functional.pad(shifted[:, :-1], (1, 0), value=IGNORED)


def read_question(context: CallContext, visual: Tensor, real: Tensor, first: bool) -> Question:
    """The question of a call.

    Args:
        context: The call.
        visual: [B, L] bool, its visual tokens.
        real: [B, L] bool, False at padding.
        first: Whether no cache came with it, so that an answer may be in it.
    """
    text = real & ~visual
    boundary = context.boundary
    if UNPRUNED not in boundary.said and boundary.trains(context) and has_unpruned_reference(boundary.parts.owner):
        boundary.warn_once(UNPRUNED)
    answer = find_answer(context, text, real, first)
    if answer is None:
        return Question(text, torch.zeros_like(text, dtype=torch.long))
    answer = answer & real
    ends = answer & ~torch.nn.functional.pad(answer[:, 1:], (0, 1))
    turn = torch.nn.functional.pad(ends.long().cumsum(1), (1, -1))
    asked = text & ~answer
    # A picture without any word of a prompt in its turn is asked for by all there is.
    turns = torch.arange(int(turn.max()) + 1, device=turn.device)
    spoken = ((turn[:, None] == turns[:, None]) & asked[:, None]).any(2).gather(1, turn)
    shown = ((turn[:, None] == turns[:, None]) & visual[:, None]).any(2).gather(1, turn)
    unasked = text & shown & ~spoken
    if ALL_ANSWER not in boundary.said and boundary.trains(context) and bool(unasked.any()):
        boundary.warn_once(ALL_ANSWER)
    return Question(asked | unasked, turn)


def find_answer(context: CallContext, text: Tensor, real: Tensor, first: bool) -> Tensor | None:
    """[B, L] bool: the tokens that are an answer, or None if nobody tells."""
    batch, length = text.shape
    slots = torch.arange(length, device=text.device)
    mine = [one for one in (context.boundary.key, context.boundary.leader) if one is not None]
    prompt = next((one for key, one in reversed(_told.get()) if any(key is own for own in mine)), None)
    if prompt is not None:
        return ~_as_mask(prompt, real)
    if context.labels is not None and context.labels.shape == text.shape:
        return context.labels.to(text.device) != IGNORED
    generated = prompt_of_generation(context.boundary)
    if generated is not None:
        # Beams repeat rows; candidates of assisted decoding, and what was said without a cache, follow the prompt.
        inside = generated.shape[1] < length and batch % max(len(generated), 1) == 0 and first
        return (slots >= generated.shape[1]).expand_as(text) if inside else None
    if not first:
        return None
    answer = answer_of_callers(context.boundary.parts.owner, text.shape)
    if answer is not None:
        return answer.to(text.device)
    if context.boundary.trains(context):
        context.boundary.warn_once(
            "a training call of a patched model tells neither labels nor prompt, so that all of its text, an answer "
            "too, chooses its visual tokens; pass labels to the model, or say where the prompt is: "
            "`with model.grip.prompt(mask_or_lengths): ...`"
        )
    return None


def _as_mask(prompt: Tensor | Sequence[int], real: Tensor) -> Tensor:
    if isinstance(prompt, Tensor):
        if prompt.shape != real.shape:
            raise ConfigError(f"prompt must have the shape of the call {tuple(real.shape)}, got {tuple(prompt.shape)}")
        return prompt.to(real.device).bool()
    if len(prompt) != len(real):
        raise ConfigError(f"prompt must have one length per row of the call ({len(real)}), got {list(prompt)}")
    return real.long().cumsum(1) <= torch.tensor(prompt, device=real.device)[:, None]
