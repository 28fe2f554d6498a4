"""What a tower selector may ask for beyond the rows: attention of a layer, and the pixels of the patches."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from ..errors import GripError
from ..families.towers import Attended, PackedAttended
from .facts import Rows
from .places import Places


@dataclasses.dataclass(frozen=True)
class Signals:
    """Taps of one call of a tower, each computed when it is asked for.

    Attributes:
        rows: Facts of the tower.
        places: Where its rows lie.
        arguments: The arguments of the tower.
        attended: Module, input and arguments of an attention, if one was noted.
    """

    rows: Rows
    places: Places
    arguments: dict[str, Any]
    attended: tuple[Any, Tensor, dict[str, Any]] | None

    def attention(self) -> Tensor:
        """[P, G] attention that each group gets: from [CLS] if there is one, else from all rows of its picture."""
        assert self.attended is not None
        module, hidden, kwargs = self.attended
        kind: Any = PackedAttended if self.rows.packed else Attended
        values = kind(self.rows, module, hidden, kwargs).salience()
        return self.places.pick(values.reshape(-1, 1))[..., 0]

    def pixels(self) -> Tensor:
        """[P, G, F] the pixels of each group.

        Raises:
            GripError: They do not come as pictures or patches.
        """
        given: Tensor = next(iter(self.arguments.values()))
        if given.ndim == 3:  # patches of pictures that are padded
            given = given.flatten(0, 1)
        if given.ndim == 2:
            return given[self.places.pixels].flatten(2)
        if given.ndim != 4:
            raise GripError(f"the vision tower was given {tuple(given.shape)}, which are no pictures [P, 3, H, W]")
        pictures, _, height, width = given.shape
        across = round(self.places.mask.shape[1] ** 0.5)
        tall, wide = height // across, width // across
        cut = given[..., : tall * across, : wide * across].unfold(2, tall, tall).unfold(3, wide, wide)
        return cut.permute(0, 2, 3, 1, 4, 5).reshape(pictures, across * across, -1)
