"""Grid: tokens spread evenly over each image, whatever it shows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..engine.keepsets import VisualBatch
from . import register
from .base import Selector


@register("grid")
class GridSelector(Selector):
    """Even spatial sub-sampling, the plainest baseline of token pruning.

    64 of 24 x 24 tokens gives the regular 8 x 8 grid; every other budget is met exactly too. Several images, or
    tiles of one image, share the budget in proportion to their tokens.
    """

    def __call__(self, batch: VisualBatch) -> Tensor:
        """Return scores [G, N]: 1 for the tokens of the grid, 0 for others."""
        scores = torch.zeros(batch.mask.shape, dtype=torch.float32)
        positions, mask, image = batch.positions.float().cpu(), batch.mask.cpu(), batch.image_index.cpu()
        for group, budget in enumerate(batch.budgets.tolist()):
            real = mask[group].nonzero().flatten()
            order = real[snake(positions[group, real], image[group, real], budget / max(len(real), 1))]
            picks = min(budget, len(order))
            ranks = (torch.arange(picks) + 0.5) * len(order) / max(picks, 1)
            scores[group, order[ranks.long()]] = 1
        return scores.to(batch.tokens.device)


def snake(positions: Tensor, image: Tensor, share: float) -> Tensor:
    """Order tokens so that every n-th one makes an even grid: positions [N, 2], image [N] -> [N] indices.

    Each image is cut into as many bands as a grid of `share` of its tokens has rows; a band is read left to right.
    """
    places, sheet = torch.cat([image[:, None], positions], 1), torch.zeros(len(image), dtype=torch.long)
    if len(image):
        _, place = places.unique(dim=0, return_inverse=True)
        # Tiles of one image have the same positions: the n-th token at a place belongs to the n-th tile.
        earlier = (place[:, None] == place).tril(-1).sum(1)
        sheet = image * (int(earlier.max()) + 1) + earlier
    keys = []
    for one in sheet.unique():
        inside = (sheet == one).nonzero().flatten()
        row, column = (positions[inside, axis].unique(return_inverse=True)[1] for axis in (0, 1))
        height, width = int(row.max()) + 1, int(column.max()) + 1
        bands = min(height, max(1, round(math.sqrt(share * len(inside) * height / width))))
        band = ((row + 0.5) * bands / height).long()
        keys.append(torch.stack([sheet[inside], band, column, row, inside], 1))
    table = sorted(torch.cat(keys).tolist()) if keys else []
    return torch.tensor([entry[-1] for entry in table], dtype=torch.long)
