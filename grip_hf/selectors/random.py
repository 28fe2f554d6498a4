"""Random: a keep-set drawn by chance, the same one whenever the same image is seen."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine.keepsets import VisualBatch
from . import register
from .base import Selector

# Constants of SplitMix64 (Steele et al., 2014) as signed 64-bit integers.
_GOLDEN, _MULTIPLIER_A, _MULTIPLIER_B = (-7046029254386353131, -4658895280553007687, -7723592293110705685)


@register("random")
class RandomSelector(Selector):
    """Uniformly random scores, seeded by `seed` and by what the image shows.

    The draw depends neither on the batch nor on the question nor on the process, so that runs can be repeated and
    answers compared. Scores are hashed, not drawn from a generator: no state, and all images at once.
    """

    def __call__(self, batch: VisualBatch) -> Tensor:
        """Return scores [G, N] in [0, 1)."""
        prints, within = fingerprints(batch.tokens, batch.mask, batch.image_index)
        # As a tensor, because the product wraps around 64 bits.
        seed = torch.full_like(prints, self.seed)
        bits = mix(mix(prints + seed * _GOLDEN) + within * _GOLDEN)
        return _shift(bits, 40).float() / 2**24


def fingerprints(tokens: Tensor, mask: Tensor, image: Tensor, channels: int = 64) -> tuple[Tensor, Tensor]:
    """A number for what each token's image shows, and the token's index within it: both [G, N] long.

    The number must not change with the rounding errors of another batch size, so it is made of whole numbers only: the
    channel whose largest value stands out most from the second largest, and the token that has it.
    """
    prints, within = torch.zeros_like(image), torch.zeros_like(image)
    values = tokens[..., :channels].float()
    for one in range(int(image.max()) + 1 if image.numel() else 0):
        inside = mask & (image == one)
        top = values.masked_fill(~inside[..., None], -torch.inf).topk(min(2, values.shape[1]), dim=1)
        spread = values.masked_fill(~inside[..., None], 0).abs().sum(1).clamp(min=1e-12)
        lead = (top.values[:, 0] - top.values[:, -1]).nan_to_num(0, 0, 0) / spread
        channel = lead.argmax(-1, keepdim=True)
        index = inside.cumsum(1) - 1
        peak = index.gather(1, top.indices[:, 0].gather(1, channel))
        prints = torch.where(inside, peak * channels + channel, prints)
        within = torch.where(inside, index, within)
    return prints, within


def mix(bits: Tensor) -> Tensor:
    """Scramble 64-bit integers, as the last step of SplitMix64 does."""
    bits = (bits ^ _shift(bits, 30)) * _MULTIPLIER_A
    bits = (bits ^ _shift(bits, 27)) * _MULTIPLIER_B
    return bits ^ _shift(bits, 31)


def _shift(bits: Tensor, by: int) -> Tensor:
    """Logical (not arithmetic) shift to the right."""
    return (bits >> by) & (2 ** (64 - by) - 1)
