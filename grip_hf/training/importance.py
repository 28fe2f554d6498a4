"""How much each visual token matters for the frozen model's answer: the targets of the warm-up."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.keepsets import topk_mask
from ..engine.received import received
from ..errors import UnsupportedModelError
from ..frozen.samples import Sample, answer_ids
from ..frozen.vlm import FrozenVLM
from ..selectors.cdpruner import greedy_determinant

Importance = Callable[[FrozenVLM, Sequence[Sample]], Tensor]


def gradient_importance(vlm: FrozenVLM, samples: Sequence[Sample]) -> Tensor:
    """Gradient x input: |<d log p(answer) / d token, token>| with respect to what enters the language model.

    Returns:
        [B, N] float32, 0 at padding; the larger, the more the answer depends on the token.

    Raises:
        UnsupportedModelError: The model's layers pass no gradients on.
    """
    return _gradient(vlm, samples, _watch(vlm, samples, gradient=True))


def attention_importance(vlm: FrozenVLM, samples: Sequence[Sample]) -> Tensor:
    """Attention from the positions that predict the answer to the visual tokens, over all layers and heads.

    Returns:
        [B, N] float32, 0 at padding.
    """
    return _attention(samples, _watch(vlm, samples, attention=True))


def combined_importance(vlm: FrozenVLM, samples: Sequence[Sample]) -> Tensor:
    """The mean of attention and gradient x input, each as shares of its sum, from one pass.

    They miss different things: attention what the answer reads through other words, the gradient what the model knows
    for sure. Where no gradient gets through (some quantized layers), attention is left, with a warning.

    Returns:
        [B, N] float32, 0 at padding; rows sum to 1.
    """
    watched = _watch(vlm, samples, gradient=True, attention=True)
    attention = shares(_attention(samples, watched))
    try:
        return (attention + shares(_gradient(vlm, samples, watched))) / 2
    except UnsupportedModelError as error:
        warnings.warn(f"the warm-up goes by attention alone: {error}", stacklevel=2)
        return attention


@dataclasses.dataclass(frozen=True)
class _Watched:
    """One pass over prompts with their answers: what entered the language model, where pictures are, what came out.

    Attributes:
        embeds: [B, L, D].
        visual: [B, L] bool.
        output: The model's.
        weights: [B, A, L], attention of the positions that predict the answers, or None if nobody asked for it.
    """

    embeds: Tensor
    visual: Tensor
    output: Any
    weights: Tensor | None


def _watch(vlm: FrozenVLM, samples: Sequence[Sample], gradient: bool = False, attention: bool = False) -> _Watched:
    """Run the frozen model on samples, on its own attention kernel."""
    seen: dict[str, Tensor] = {}

    def enter(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        seen["embeds"] = kwargs["inputs_embeds"].detach().requires_grad_(gradient)
        return args, {**kwargs, "inputs_embeds": seen["embeds"]}

    def remember(batch: dict[str, Tensor]) -> Tensor:
        seen["visual"] = vlm.visual_mask(batch["input_ids"])
        return batch["attention_mask"]

    language_model, asking = vlm.parts.language_model, max(len(sample.answer) for sample in samples)
    with contextlib.ExitStack() as around:
        around.enter_context(torch.set_grad_enabled(gradient))
        around.enter_context(language_model.register_forward_pre_hook(enter, with_kwargs=True))
        given = around.enter_context(received(language_model, asking)) if attention else None
        output = vlm.run(samples, attention_mask=remember)
    return _Watched(seen["embeds"], seen["visual"], output, None if given is None else given.weights)


def _gradient(vlm: FrozenVLM, samples: Sequence[Sample], watched: _Watched) -> Tensor:
    ids, mask = answer_ids(samples)
    logs = watched.output.logits.float().log_softmax(-1)
    told = logs.gather(2, ids[..., None]).squeeze(-1)[mask].sum()
    (gradient,) = torch.autograd.grad(told, watched.embeds)
    if not bool(gradient.any()):
        raise UnsupportedModelError(
            f"no gradient reaches the visual tokens of {type(vlm.model).__name__} (some quantized layers pass none "
            "on); use target='attention'"
        )
    effect = (gradient.float() * watched.embeds.detach().float()).sum(-1).abs()
    return _per_sample(effect, watched.visual)


def _attention(samples: Sequence[Sample], watched: _Watched) -> Tensor:
    _, mask = answer_ids(samples)
    assert watched.weights is not None
    return _per_sample((watched.weights * mask[..., None]).sum(1), watched.visual)


def _per_sample(values: Tensor, visual: Tensor) -> Tensor:
    """Values [B, L] of the visual tokens of each row: [B, N], zeros behind."""
    rows = [row[seen] for row, seen in zip(values, visual, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def shares(values: Tensor) -> Tensor:
    """Values [B, N] >= 0 as shares of their row's sum; rows of nothing stay zeros."""
    return values / values.sum(1, keepdim=True).clamp(min=1e-12)


def spread_out(tokens: Tensor, mask: Tensor, importance: Tensor, budgets: Tensor) -> Tensor:
    """Important tokens that differ: the greedy choice of a determinantal point process.

    Its kernel is the tokens' cosine similarity times the fourth root of each importance, so that a token whose like
    has been picked waits until the other things in the picture have one.

    Args:
        tokens: [G, N, D] float.
        mask: [G, N] bool, True at real tokens.
        importance: [G, N] float >= 0, 0 at padding.
        budgets: [G] long.

    Returns:
        [G, N] bool, True at the tokens to keep.
    """
    weight = (importance.float() / importance.amax(1, keepdim=True).clamp(min=1e-12)).pow(0.25)
    features = F.normalize(tokens.float(), dim=-1) * weight[..., None]
    return topk_mask(greedy_determinant(features, mask, budgets), mask, budgets)


IMPORTANCES: dict[str, Importance] = {
    "combined": combined_importance,
    "gradient": gradient_importance,
    "attention": attention_importance,
}
