"""What chooses the rows of a vision tower without training, behind the interface of every selector.

A group of rows that makes one visual token stands for a token: `batch.tokens` [P, G, C] are the means of the groups'
hidden states where they enter the layer that drops, a picture is a sample, and `batch.text` is empty. `needs` names
signals of the tower (see `signals`).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.keepsets import VisualBatch
from ..errors import ConfigError
from ..selectors.base import Selector
from ..selectors.diversity import DiversitySelector
from ..selectors.grid import GridSelector
from ..selectors.random import RandomSelector

TRAINING_FREE = "distance"  # best of those that need no training in the table of this folder's README


class DistanceSelector(Selector):
    """Keep rows far from the mean row of their picture, by cosine: background is what most rows show."""

    name = "distance"

    def __call__(self, batch: VisualBatch) -> Tensor:
        """Return scores [P, G] in [0, 2]."""
        return distance_from_mean(batch.tokens, batch.mask)


class ClsAttentionSelector(Selector):
    """Keep rows with most attention from [CLS], or from all rows where there is none, in the last whole layer."""

    name = "cls_attention"
    needs: tuple[str, ...] = ("attention",)
    attends: ClassVar[bool] = True

    def __call__(self, batch: VisualBatch) -> Tensor:
        """Return scores [P, G] >= 0."""
        return batch.taps["attention"].float()


class DuplicatesSelector(Selector):
    """Drop patches first whose pixels equal those of the patch to the left or above exactly (PixelPrune, 2026).

    Of the others those stay that are far from the mean row. `duplicates` tells after a call how many of its patches
    were such copies, per picture: so many cost nothing to drop.
    """

    name = "duplicates"
    needs: tuple[str, ...] = ("pixels",)
    duplicates: Tensor | None = None

    def __call__(self, batch: VisualBatch) -> Tensor:
        """Return scores [P, G]: 2 more for patches that are no copies."""
        copies = equal_neighbours(batch.taps["pixels"], batch.positions, batch.mask)
        self.duplicates = copies.sum(1)
        return distance_from_mean(batch.tokens, batch.mask) + 2 * (~copies).float()


def distance_from_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """[P, G] float32 in [0, 2], 1 - cosine between tokens [P, G, C] and the mean of those that `mask` [P, G] marks."""
    tokens = tokens.float() * mask[..., None]
    mean = tokens.sum(1, keepdim=True) / mask.sum(1)[:, None, None].clamp(min=1)
    return 1 - F.cosine_similarity(tokens, mean, dim=-1)


def equal_neighbours(pixels: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """Which patches are exact copies of the one to the left or above.

    Args:
        pixels: [P, G, F].
        positions: [P, G, 2] (row, column) in [0, 1] on a full grid.
        mask: [P, G] bool, True at real patches.

    Returns:
        [P, G] bool.
    """
    copies = torch.zeros_like(mask)
    for one, (values, places, real) in enumerate(zip(pixels, positions, mask, strict=True)):
        index = real.nonzero().flatten()
        row, column = (places[index, axis].unique(return_inverse=True)[1] for axis in (0, 1))
        table = torch.full((int(row.max()) + 1, int(column.max()) + 1), -1, device=index.device)
        table[row, column] = index
        for shift, axis in ((1, 0), (1, 1)):
            before = table.roll(shift, axis)
            before.select(axis, 0).fill_(-1)
            other = before[row, column]
            same = (values[index] == values[other.clamp(min=0)]).all(-1) & (other >= 0)
            copies[one, index] |= same
    return copies


TOWER_SELECTORS: dict[str, type[Any]] = {
    "cls_attention": ClsAttentionSelector,
    "distance": DistanceSelector,
    "diversity": DiversitySelector,
    "duplicates": DuplicatesSelector,
    "grid": GridSelector,
    "random": RandomSelector,
}


def get_tower_selector(name: str, seed: int = 0) -> Any:
    """Build the tower selector of this name.

    Raises:
        ConfigError: There is none.
    """
    if name not in TOWER_SELECTORS:
        raise ConfigError(f"unknown tower_selector {name!r}; known ones are {sorted(TOWER_SELECTORS)}")
    selector = TOWER_SELECTORS[name]()
    selector.seed = seed
    return selector
