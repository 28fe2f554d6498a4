"""The random weights that an untrained scorer starts from.

Set once, when a scorer is made, by a plain function that reads and writes modules alone: what transformers' hook
`_init_weights` is called for, and when, has changed from release to release.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .layers import Attention


@torch.no_grad()
def draw_weights(module: nn.Module) -> None:
    """Draw the weights of all linear layers of a module, in the order in which they were made.

    They are normal with a variance of 1 / inputs, so that outputs have the variance of inputs; what attention adds
    starts at half of that deviation. The last layers of MLPs start like all others, not smaller. Biases start at 0;
    norms start as the identity and null keys at 0, as torch and `Attention` make them.

    Args:
        module: What to draw for; only its `nn.Linear` layers, and `Attention` among them, are changed.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.weight.normal_(std=part.in_features**-0.5)
            if part.bias is not None:
                part.bias.zero_()
    for part in module.modules():
        if isinstance(part, Attention):
            part.output.weight.mul_(0.5)


@torch.no_grad()
def start_as_a_matcher(visual: nn.Linear, words: nn.Linear, attentions: Iterable[Any]) -> None:
    """Let visual tokens and words start in one space, and queries equal to keys, so that like finds like.

    Args:
        visual: Projection of the visual tokens, which is copied to the words'.
        words: Projection of the words.
        attentions: `Attention` layers from visual tokens to words, whose query is copied to the key.
    """
    words.weight.copy_(visual.weight)
    for attention in attentions:
        attention.key.weight.copy_(attention.query.weight)
