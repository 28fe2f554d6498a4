"""The layers of the learned scorer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention with a learned null key, so that "nothing fits" is an answer and there may be no keys."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, inner, bias=False)
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(width, inner, bias=False)
        self.null = nn.Parameter(torch.zeros(2, inner))
        self.output = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, context: Tensor, context_mask: Tensor) -> Tensor:
        """Map x [G, N, W], context [G, S, W], context_mask [G, S] bool to [G, N, W]."""
        null_key, null_value = self.null.expand(len(x), -1, -1).unsqueeze(2).unbind(1)
        key = torch.cat([null_key.to(context.dtype), self.key(context)], 1)
        value = torch.cat([null_value.to(context.dtype), self.value(context)], 1)
        query, key, value = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.query(x), key, value))
        seen = F.pad(context_mask, (1, 0), value=True)[:, None, None]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return self.output(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Sequential):
    """Two linear layers with a GELU between."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, out))


class TextBlock(nn.Module):
    """One pre-norm transformer block over the words, so that a word knows its neighbours."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.mlp = Attention(width, inner, heads), Mlp(width, width, width)

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        """Map text [G, T, W], mask [G, T] bool to [G, T, W]."""
        normed = self.norm1(text)
        text = text + self.attention(normed, normed, mask)
        return text + self.mlp(self.norm2(text))


class VisualBlock(nn.Module):
    """Visual tokens look at the words, then at each other; the budget modulates what follows (FiLM)."""

    def __init__(self, width: int, inner: int, heads: int, query_aware: bool) -> None:
        super().__init__()
        self.to_text = Attention(width, inner, heads) if query_aware else None
        self.norm1 = nn.LayerNorm(width) if query_aware else None
        self.to_visual, self.mlp = Attention(width, inner, heads), Mlp(width, width, width)
        self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor, text: Tensor | None, text_mask: Tensor | None, film: Tensor) -> Tensor:
        """Map x [G, N, W], mask [G, N], text [G, T, W], text_mask [G, T], film [G, 1, 2 W] to [G, N, W]."""
        if self.to_text is not None and self.norm1 is not None:
            assert text is not None and text_mask is not None
            x = x + self.to_text(self.norm1(x), text, text_mask)
        normed = self.norm2(x)
        x = x + self.to_visual(normed, normed, mask)
        scale, shift = film.chunk(2, -1)
        return x + self.mlp(self.norm3(x) * (1 + scale) + shift)
