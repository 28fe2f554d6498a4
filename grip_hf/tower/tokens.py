"""From rows of the vision tower to visual tokens of the language model: which of them lack rows."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from ..engine.methods import InstanceMethod
from ..engine.taps import encoder, publish, taken_out
from .facts import Rows
from .places import Places
from .survivors import tap_of

TILES = "tower.tiles"  # tap [tiles, groups] of what the method that packs them is to lay out
NEWLINE = "image_newline"


def in_order(values: Tensor, places: Places, rows: Rows) -> Tensor:
    """Values [P, G, ...] of the groups that make visual tokens, as the language model gets these: [tokens, ...]."""
    picked = values[places.tokens]
    if not rows.window:
        return picked
    order = places.pixels[places.tokens][:, 0] // rows.merge**2
    return torch.empty_like(picked).index_copy(0, order, picked)


def tokens_of(alive: Tensor, places: Places, rows: Rows) -> Tensor:
    """Which visual tokens have rows, in the order in which the language model gets them.

    Args:
        alive: [P, G] bool, the groups that have.
        places: Where they lie.
        rows: Facts of the tower.

    Returns:
        [visual tokens] bool.
    """
    if rows.keep_prefix:
        return torch.nn.functional.pad(alive, (rows.prefix, 0), value=True).flatten()
    return in_order(alive, places, rows)


class Pack(InstanceMethod):
    """The method that lays out the tokens of a picture's tiles, which lays out the same of what has rows.

    Tokens that are mixed of several are taken for such only if all of them have rows.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Lay out as the model itself does."""
        output = self.own(*args, **kwargs)
        tiles = taken_out(TILES)
        if tiles is not None:
            given = self.__signature__.bind(*args, **kwargs)
            name = next(iter(given.arguments))
            numbers = [len(one) for one in given.arguments[name]]
            given.arguments[name] = list(tiles.float()[..., None].split(numbers))
            if given.arguments.get(NEWLINE) is not None:
                given.arguments[NEWLINE] = tiles.new_ones(1, dtype=torch.float)
            laid_out, _ = self.own(*given.args, **given.kwargs)
            publish(tap_of(encoder()), tiles, lambda: torch.cat(list(laid_out))[:, 0] > 1 - 1e-3)
        return output

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the model's own method."""
        return inspect.signature(self.own)
