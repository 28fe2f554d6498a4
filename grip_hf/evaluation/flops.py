"""How many floating-point operations a forward pass takes, counted on paper.

`torch.utils.flop_counter` is not used: it counts SDPA on a CPU as 0 and causal attention as the whole map. The tests
hold the count against it where it sees all, in eager attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def prefill_flops(language_model: nn.Module, tokens: Sequence[int]) -> float:
    """FLOPs of a causal decoder whose layers see `tokens` tokens each, without its output head.

    Two per weight and token in the linear layers; in attention, queries times keys and weights times values over the
    causal half of the map.
    """
    config: Any = language_model.config
    weights = sum(module.weight.numel() for module in language_model.modules() if isinstance(module, nn.Linear))
    heads = config.num_attention_heads
    width = (getattr(config, "head_dim", None) or config.hidden_size // heads) * heads
    return sum(2.0 * weights / len(tokens) * count + 2.0 * width * count * (count + 1) for count in tokens)
