"""Where the rows of one call of a tower lie, from its arguments; and a tap of them, for training."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor, nn

from ..engine import upstream
from ..engine.taps import publish
from ..errors import UnsupportedModelError
from ..families.table import find_parts
from ..families.towers import real_keys
from .facts import Tower, find_tower
from .places import Places, packed_places, shaped_places, square_places
from .tokens import in_order

TAP = "tower_rows"


def places_of(
    tower: Tower, arguments: dict[str, Any], hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Places:
    """The places of a call's rows.

    Args:
        tower: The tower.
        arguments: Its arguments, by name.
        hidden: What enters one of its layers.
        args: That layer's arguments.
        kwargs: Likewise.

    Raises:
        GripError: Pictures have a size whose groups are not known.
    """
    rows = tower.rows
    if upstream.SHAPES in arguments:
        return shaped_places(arguments[upstream.SHAPES], hidden.shape[1], rows.merge, hidden.device)
    if rows.packed:
        return packed_places(arguments[upstream.GRID], rows.merge, rows.window, hidden.device)
    given = {**dict(zip(upstream.parameters(tower.layers[0]), args, strict=False)), **kwargs}
    real = real_keys(given.get("attention_mask"))
    return square_places(len(hidden), hidden.shape[1], rows.prefix, rows.merge, real, hidden.device)


class RowsTap:
    """Publishes what a tower scorer sees, one row per visual token.

    Args:
        depth: After how many layers of the tower, or which share of them; None for a third.
    """

    def __init__(self, depth: float | None = None) -> None:
        self.depth = depth
        self._arguments = threading.local()

    def __call__(self, model: nn.Module) -> list[Any]:
        """Register the hooks; returns their handles.

        Raises:
            UnsupportedModelError: Not every visual token is made of a group of rows.
        """
        self.tower = tower = find_tower(find_parts(model), self.depth)
        if tower.rows.packing or tower.rows.keep_prefix:
            raise UnsupportedModelError(
                f"a tower scorer cannot be trained for {type(model).__name__}: some of its visual tokens are made of "
                "no rows of the vision tower"
            )
        self.names = upstream.parameters(tower.module)
        return [
            tower.module.register_forward_pre_hook(self._remember, with_kwargs=True),
            tower.layers[tower.first].register_forward_pre_hook(self._publish, with_kwargs=True),
        ]

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._arguments.last = {**dict(zip(self.names, args, strict=False)), **kwargs}

    def _publish(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]

        def rows() -> Tensor:
            places = places_of(self.tower, self._arguments.last, hidden, args, kwargs)
            return in_order(places.pick(hidden.detach().flatten(0, -2)), places, self.tower.rows)

        publish(TAP, hidden, rows)
