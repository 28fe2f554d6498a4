"""Original positions of kept tokens: written beside their embeddings, read where these meet. Pure tensor functions.

vLLM knows a prompt by its K kept tokens before it knows which of the N visual tokens they are. So the K placeholders
of a picture start with one position, that of the picture's first token, and how far each lies behind it travels with
the embeddings, in channels of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BASE = 256  # the largest run of whole numbers that bfloat16 holds without gaps
DIGITS = 2


def write_offsets(rows: Tensor, offsets: Tensor) -> Tensor:
    """Put offsets behind embeddings.

    Args:
        rows: [K, D] embeddings of any float dtype.
        offsets: [K, A] long, in [0, 65536), one column for each axis of positions.

    Returns:
        [K, D + 2 A] of the same dtype.
    """
    digits = torch.stack([offsets // BASE, offsets % BASE], -1).flatten(1)
    return torch.cat([rows, digits.to(rows)], 1)


def read_offsets(rows: Tensor, axes: int) -> tuple[Tensor, Tensor]:
    """Undo `write_offsets`: the embeddings [K, D] and the offsets [K, axes] long."""
    width = rows.shape[1] - DIGITS * axes
    high, low = rows[:, width:].long().unflatten(1, (axes, DIGITS)).unbind(-1)
    return rows[:, :width], high * BASE + low


def embedded_span(content: Tensor, visual: Tensor) -> tuple[int, int]:
    """From the first to behind the last visual token of a picture's unpruned content [R]; `visual` [R] bool."""
    seen = visual.nonzero().flatten()
    return int(seen[0]), int(seen[-1]) + 1


def embedded_range(position: Any) -> tuple[int, int]:
    """Where the embedded tokens of a `PlaceholderRange` lie in a prompt: (start, stop)."""
    if position.is_embed is None:
        return position.offset, position.offset + position.length
    inside = position.is_embed.nonzero().flatten()
    return position.offset + int(inside[0]), position.offset + int(inside[-1]) + 1


def grow(tokens: list[int], spans: list[tuple[int, int]], regions: list[list[int]]) -> tuple[list[int], list[int]]:
    """The unpruned prompt behind a pruned one.

    Args:
        tokens: the pruned prompt.
        spans: where pictures lie in it, (start, stop), rising.
        regions: what lay there before pruning.

    Returns:
        The unpruned prompt, and for each token of the pruned one its index there; all tokens of a span have that of
        the span's first.
    """
    full: list[int] = []
    index: list[int] = []
    at = 0
    for (start, stop), region in zip(spans, regions, strict=True):
        index += range(len(full), len(full) + start - at)
        full += tokens[at:start]
        index += [len(full)] * (stop - start)
        full += region
        at = stop
    index += range(len(full), len(full) + len(tokens) - at)
    return full + tokens[at:], index
