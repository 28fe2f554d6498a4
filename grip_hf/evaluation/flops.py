"""How many floating-point operations a forward pass takes, counted on paper."""

from __future__ import annotations

from typing import Any

from torch import nn


def prefill_flops(language_model: nn.Module, tokens: int) -> float:
    """FLOPs of a causal decoder over `tokens` tokens, without its output head.

    Two per weight and token in the linear layers; in attention, queries times keys and weights times values over the
    causal half of the map.
    """
    config: Any = language_model.config
    weights = sum(module.weight.numel() for module in language_model.modules() if isinstance(module, nn.Linear))
    heads = config.num_attention_heads
    width = (getattr(config, "head_dim", None) or config.hidden_size // heads) * heads
    return 2.0 * weights * tokens + 2.0 * config.num_hidden_layers * width * tokens * (tokens + 1)
