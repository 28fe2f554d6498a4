"""How much each visual token matters for the frozen model's answer: the targets of the warm-up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from .features import FrozenVLM
from .samples import Sample, answer_ids

Importance = Callable[[FrozenVLM, Sequence[Sample]], Tensor]


def gradient_importance(vlm: FrozenVLM, samples: Sequence[Sample]) -> Tensor:
    """Gradient x input: |<d log p(answer) / d token, token>| with respect to what enters the language model.

    Returns:
        [B, N] float32, 0 at padding; the larger, the more the answer depends on the token.

    Raises:
        UnsupportedModelError: The model's layers pass no gradients on.
    """
    entered: dict[str, Any] = {}

    def watch(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        entered["embeds"] = kwargs["inputs_embeds"].detach().requires_grad_()
        return args, {**kwargs, "inputs_embeds": entered["embeds"]}

    def remember(batch: dict[str, Tensor]) -> Tensor:
        entered["visual"] = vlm.visual_mask(batch["input_ids"])
        return batch["attention_mask"]

    ids, mask = answer_ids(samples)
    with torch.enable_grad(), vlm.parts.language_model.register_forward_pre_hook(watch, with_kwargs=True):
        logs = vlm.run(samples, attention_mask=remember).logits.float().log_softmax(-1)
        told = logs.gather(2, ids[..., None]).squeeze(-1)[mask].sum()
        (gradient,) = torch.autograd.grad(told, entered["embeds"])
    if not bool(gradient.any()):
        raise UnsupportedModelError(
            f"no gradient reaches the visual tokens of {type(vlm.model).__name__} (some quantized layers pass none "
            "on); use target='attention'"
        )
    effect = (gradient.float() * entered["embeds"].detach().float()).sum(-1).abs()
    return _per_sample(effect, entered["visual"])


@torch.no_grad()
def attention_importance(vlm: FrozenVLM, samples: Sequence[Sample]) -> Tensor:
    """Attention from the positions that predict the answer to the visual tokens, over all layers and heads.

    Attention maps need the eager kernel, so the language model is switched to it meanwhile.

    Returns:
        [B, N] float32, 0 at padding.
    """
    entered: dict[str, Tensor] = {}

    def remember(batch: dict[str, Tensor]) -> Tensor:
        entered["visual"] = vlm.visual_mask(batch["input_ids"])
        return batch["attention_mask"]

    language_model: Any = vlm.parts.language_model
    before = language_model.config._attn_implementation
    language_model.set_attn_implementation("eager")
    try:
        maps = vlm.run(samples, attention_mask=remember, output_attentions=True).attentions
    finally:
        language_model.set_attn_implementation(before)
    _, mask = answer_ids(samples)
    longest, weight = mask.shape[1], mask.float()
    received = torch.zeros_like(entered["visual"], dtype=torch.float32)
    for layer in maps:  # [B, heads, L, L]; answers are predicted one position before they stand
        asking = layer[:, :, -longest - 1 : -1].float().mean(1)
        received += (asking * weight[..., None]).sum(1)
    return _per_sample(received, entered["visual"])


def _per_sample(values: Tensor, visual: Tensor) -> Tensor:
    """Values [B, L] of the visual tokens of each row: [B, N], zeros behind."""
    rows = [row[seen] for row, seen in zip(values, visual, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


IMPORTANCES: dict[str, Importance] = {"gradient": gradient_importance, "attention": attention_importance}
