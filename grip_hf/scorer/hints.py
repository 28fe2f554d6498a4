"""What heuristics live on, as input features of the learned scorer: pure tensor functions, padding-invariant.

`hints` gives each visual token its norm, its distance to the mean token and its similarity to the words of the
question; a scorer that sees them can do what the heuristics built on them do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NUM_VISUAL_HINTS = 3
NUM_QUERY_HINTS = 5
POSITION_OCTAVES = 5
NUM_POSITION_FEATURES = 2 + 4 * POSITION_OCTAVES


def standardize(x: Tensor, mask: Tensor) -> Tensor:
    """Zero mean and unit variance over the real tokens: x [G, N, C], mask [G, N] -> [G, N, C], 0 at padding."""
    real = mask[..., None]
    count = real.sum(1, keepdim=True).clamp(min=1)
    x = x.masked_fill(~real, 0)
    x = (x - x.sum(1, keepdim=True) / count).masked_fill(~real, 0)
    return x * (x.square().sum(1, keepdim=True) / count).add(1e-6).rsqrt()


def cosines(tokens: Tensor, norms: Tensor, others: Tensor) -> Tensor:
    """Cosines of tokens [G, N, D], of lengths `norms` [G, N, 1], with others [G, T, D] -> [G, N, T] float32."""
    return (tokens @ others.transpose(1, 2)).float() / (norms * lengths(others).transpose(1, 2))


def lengths(x: Tensor) -> Tensor:
    """Lengths of vectors [..., D] of any float dtype, at least 1e-6: [..., 1] float32."""
    wide = torch.promote_types(x.dtype, torch.float32)  # half precision would overflow
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).float().clamp(min=1e-6)


def hints(tokens: Tensor, norms: Tensor, mask: Tensor, text: Tensor | None, text_mask: Tensor | None) -> Tensor:
    """Cheap features of each visual token.

    Args:
        tokens: [G, N, D] visual tokens.
        norms: [G, N, 1] their lengths, > 0.
        mask: [G, N] bool, True at real tokens.
        text: [G, T, D] words, or None.
        text_mask: [G, T] bool, True at real words, or None.

    Returns:
        [G, N, 3 or 8] float32: standardized log-norm; cosine to the mean token, raw and standardized; with text also
        the largest and the mean cosine to the words, raw and standardized, and how far the token stands out for the
        word that it fits best.
    """
    # As a product, so that no copy of the tokens is made; only the direction of the mean matters.
    share = mask / mask.sum(1, keepdim=True).clamp(min=1)
    centre = cosines(tokens, norms, share[:, None].to(tokens.dtype) @ tokens)
    if text is None or text_mask is None:
        return torch.cat([standardize(torch.cat([norms.log(), centre], -1), mask), centre], -1)
    similar, words = cosines(tokens, norms, text), text_mask[:, None]
    spoken = words.any(-1, keepdim=True)
    count = words.sum(-1, keepdim=True).clamp(min=1)
    average = similar.masked_fill(~words, 0).sum(-1, keepdim=True) / count
    # The floor below every cosine (and every standardized one) also serves a text of no words.
    best, standout = (
        torch.cat([s.masked_fill(~words, -1e4), s.new_full((*s.shape[:2], 1), -1e4)], -1).amax(-1, keepdim=True)
        for s in (similar, standardize(similar, mask))
    )
    best, standout = best.masked_fill(~spoken, 0), standout.masked_fill(~spoken, 0)
    raw = torch.cat([centre, best, average], -1)
    return torch.cat([standardize(torch.cat([norms.log(), raw], -1), mask), raw, standout], -1)


def position_features(positions: Tensor) -> Tensor:
    """Sines and cosines of (row, column) at doubling frequencies: [G, N, 2] in [0, 1] -> [G, N, 22]."""
    octaves = math.pi * 2.0 ** torch.arange(POSITION_OCTAVES, device=positions.device, dtype=positions.dtype)
    angles = (positions[..., None] * octaves).flatten(-2)
    return torch.cat([positions, angles.sin(), angles.cos()], -1)


def sinusoid(steps: Tensor, width: int) -> Tensor:
    """The usual sinusoidal code of a position in a sequence: [G, T] -> [G, T, width] float32."""
    half = (width + 1) // 2
    rates = torch.exp(torch.arange(half, device=steps.device) * (-math.log(1e4) / half))
    angles = steps[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1)[..., :width]


def budget_features(keep_ratio: Tensor) -> Tensor:
    """[G, 2] float32 of a share [G] in (0, 1]: itself and its logarithm, so that small budgets can be told apart."""
    ratio = keep_ratio.float()
    return torch.stack([ratio, ratio.clamp(min=1e-4).log() / 4], -1)


def unit_rms(text: Tensor) -> Tensor:
    """[G, T, 1] what brings word embeddings [G, T, D] to a root mean square of 1, in their dtype."""
    return text.float().square().mean(-1, keepdim=True).add(1e-12).rsqrt().to(text.dtype)
