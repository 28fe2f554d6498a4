"""Calls of a patched model while they run, and what can be told about them: taps, and which text is the question."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import torch
from torch import Tensor

from . import taps
from .attention_masks import Step
from .cache import CacheState
from .upstream import find_cache


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a caller says about the text that follows the prompt: `labels` [B, L], or its `length` from the end."""

    labels: Tensor | None
    length: int


@dataclasses.dataclass
class Call:
    """One call of the base model, while it runs."""

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    attention_mask: Any
    encoded: list[Any]
    answer: Answer | None = None
    step: Step | None = None
    state: CacheState | None = None


class Calls(threading.local):
    """What runs in this thread: calls of base models, and answers given to the models around them, by boundary."""

    def __init__(self) -> None:
        self.running: dict[int, Call] = {}
        self.answers: dict[int, Answer] = {}


calls = Calls()


def taps_of(call: Call) -> dict[str, Tensor]:
    """The taps of this call; those of pictures encoded by `generate` stay with their features for later calls."""
    features = taps.collect()
    if call.encoded and not isinstance(call.encoded[0], (Tensor, tuple, list)):
        if features:
            call.encoded[0].grip_taps = features
        return getattr(call.encoded[0], "grip_taps", {})
    return features


def prompt_text(call: Call, kwargs: dict[str, Any], text: Tensor) -> Tensor:
    """[B, L] bool: the part of `text` [B, L] that is prompt, so that the choice does not depend on the answer.

    In training, labels mark the answer. A caller who asks for the last n logits scores n - 1 tokens: an answer, or
    the candidates of assisted decoding. In generation without a cache, the answer is what the first call had not. A
    row without any text before its answer is taken whole.
    """
    prompt = _prompt_length(call, kwargs)
    if prompt is not None:
        return text & (torch.arange(text.shape[1], device=text.device) < prompt)
    if call.answer is None:
        return text
    asked = text & (torch.arange(text.shape[1], device=text.device) < text.shape[1] - call.answer.length)
    if call.answer.labels is not None and call.answer.labels.shape == text.shape:
        asked = asked & (call.answer.labels.to(text.device) == -100)
    return torch.where(asked.any(1, keepdim=True), asked, text)


def _prompt_length(call: Call, kwargs: dict[str, Any]) -> int | None:
    """Number of tokens before generated ones, where that is known.

    `generate(use_cache=False)` calls the model with an ever longer sequence and the same encoded pictures.
    """
    if find_cache(kwargs) is not None or call.input_ids is None or not call.encoded:
        return None
    carrier = call.encoded[0]
    if isinstance(carrier, (Tensor, tuple, list)):
        return None
    first: Tensor | None = getattr(carrier, "grip_prompt", None)
    ids = call.input_ids
    if first is not None and first.shape[0] == ids.shape[0] and torch.equal(ids[:, : first.shape[1]], first):
        return first.shape[1]
    carrier.grip_prompt = ids
    return None
