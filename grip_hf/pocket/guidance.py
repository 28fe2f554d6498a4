"""Guidance for the language model of the pocket LLaVA: where the words of a question should look.

Without it, retrieval from the visual tokens did not emerge within a CPU's budget of scenes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

LAYER = 1  # the first layer has mixed each word with its neighbours, so this one knows what to look for
LOOKING_HEADS, TALLYING_HEAD = slice(0, 2), slice(-1, None)


def guidance_loss(
    attention: LlamaAttention, inputs: Mapping[str, Any], looks: torch.Tensor, tallied: torch.Tensor
) -> torch.Tensor:
    """Teach some heads of a layer where to look.

    The looking heads lose the negative log of the share of their picture attention that falls on the evidence. The
    tallying head learns even attention over <s> and the middle of every object of the kind, so that the share of
    <s> tells how many there are.

    Args:
        attention: The attention of layer `LAYER`.
        inputs: Its keyword arguments in a call on <s>, N visual tokens and T question tokens.
        looks: Evidence of each question token among the visual tokens `[B, T, N]` bool; none where nothing is known.
        tallied: Question tokens that look at all objects of a kind `[B, T]` bool.
    """
    hidden, (cos, sin) = inputs["hidden_states"], inputs["position_embeddings"]
    images = looks.shape[-1]
    shape = (*hidden.shape[:2], -1, attention.head_dim)
    queries = attention.q_proj(hidden).view(shape).transpose(1, 2)
    keys = attention.k_proj(hidden).view(shape).transpose(1, 2)
    queries, keys = apply_rotary_pos_emb(queries, keys, cos, sin)
    scores = (queries[:, :, 1 + images :] @ keys[:, :, : 1 + images].transpose(-1, -2) * attention.scaling).float()
    share = scores[:, LOOKING_HEADS, :, 1:].log_softmax(-1)
    share = share.masked_fill(~looks[:, None], -torch.inf).logsumexp(-1)
    known = looks.any(-1)[:, None].expand_as(share)
    even = torch.cat([torch.ones_like(tallied)[..., None], looks], -1)[tallied].float()
    tally = F.cross_entropy(scores[:, TALLYING_HEAD].squeeze(1)[tallied], even / even.sum(-1, keepdim=True))
    return -share[known].mean() + tally
