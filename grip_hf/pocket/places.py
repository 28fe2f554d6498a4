"""Where things stand in a scene, as plain data: no pixels here."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from grip_hf.pocket.splits import WORDS, pair_is_held_out
from grip_hf.pocket.vocabulary import CATEGORIES, COLOURS, COLUMNS, ROWS, WORD_LENGTH

PATCH_SIZE = 16
IMAGE_SIZE = 192
PATCHES = IMAGE_SIZE // PATCH_SIZE  # 12 a side, so 144 visual tokens
CELLS = 4  # a side
CELL_PATCHES = PATCHES // CELLS  # 3 a side
CELL_SIZE = CELL_PATCHES * PATCH_SIZE  # 48 pixels

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Thing(ABC):
    """One object of a scene.

    Attributes:
        category: Index into `CATEGORIES`.
        plate: Colour name of the plate behind it, or None.
        word: The printed word below it, or None.
        box: Left, top, right, bottom of the drawn object in pixels.
    """

    category: int
    plate: str | None
    word: str | None
    box: Box

    side: ClassVar[int]  # visual tokens on a side of the picture

    @property
    @abstractmethod
    def letters(self) -> tuple[int, ...]:
        """The visual tokens of the printed word, one a letter; empty without a word."""

    @property
    @abstractmethod
    def cell(self) -> tuple[int, ...]:
        """All visual tokens that belong to it."""

    @property
    @abstractmethod
    def corner(self) -> str | None:
        """The quarter of the picture that it stands in; None where that is hard to say."""

    @abstractmethod
    def seen_from(self, other: Any) -> str | None:
        """On which side of another object of the scene it stands; None where that is hard to say."""

    @property
    def name(self) -> str:
        """The category's word."""
        return CATEGORIES[self.category]

    @property
    def patches(self) -> tuple[int, ...]:
        """Visual tokens (row-major) that the object covers by at least half a patch both ways."""
        return covered(self.box, self.side, PATCH_SIZE)

    @property
    def middle(self) -> tuple[float, float]:
        """Middle of the object in pixels: x, y."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    @property
    def centre(self) -> int:
        """The one visual token under the middle of the object."""
        return token_at(*self.middle, self.side, PATCH_SIZE)


@lru_cache(maxsize=4096)
def covered(box: Box, side: int, patch: float) -> tuple[int, ...]:
    """Visual tokens of a side x side grid of such patches that a box covers by at least half a patch both ways."""
    columns, rows = (
        [i for i in range(side) if min(high, (i + 1) * patch) - max(low, i * patch) >= patch / 2]
        for low, high in ((box[0], box[2]), (box[1], box[3]))
    )
    return tuple(r * side + c for r in rows for c in columns)


def token_at(x: float, y: float, side: int, patch: float) -> int:
    """The visual token under a point."""
    return int(y // patch) * side + int(x // patch)


@dataclass(frozen=True)
class Item(Thing):
    """One object in a cell of a 4 x 4 grid.

    Attributes:
        row: Row of its cell, 0 to 3.
        column: Column of its cell, 0 to 3.
    """

    row: int
    column: int

    side: ClassVar[int] = PATCHES

    @property
    def letters(self) -> tuple[int, ...]:
        """The visual tokens of the printed word, one a letter; empty without a word."""
        if self.word is None:
            return ()
        first = ((self.row + 1) * CELL_PATCHES - 1) * PATCHES + self.column * CELL_PATCHES
        return tuple(first + i for i in range(WORD_LENGTH))

    @property
    def cell(self) -> tuple[int, ...]:
        """All nine visual tokens of the item's cell."""
        rows = range(self.row * CELL_PATCHES, (self.row + 1) * CELL_PATCHES)
        columns = range(self.column * CELL_PATCHES, (self.column + 1) * CELL_PATCHES)
        return tuple(r * PATCHES + c for r in rows for c in columns)

    @property
    def plate_box(self) -> Box:
        """Where the plate behind it is drawn, one pixel inside its cell."""
        left, top = self.column * CELL_SIZE, self.row * CELL_SIZE
        return left + 1, top + 1, left + CELL_SIZE - 2, top + CELL_SIZE - 2

    @property
    def word_box(self) -> Box:
        """Where its word is printed, at the foot of its cell."""
        left, bottom = self.column * CELL_SIZE, (self.row + 1) * CELL_SIZE
        return left, bottom - PATCH_SIZE, left + CELL_SIZE, bottom

    @property
    def corner(self) -> str | None:
        """The quarter of the picture that it stands in."""
        return f"{ROWS[self.row >= CELLS // 2]} {COLUMNS[self.column >= CELLS // 2]}"

    def seen_from(self, other: "Item") -> str | None:
        """On which side of another item it stands; None unless they share a row or a column."""
        if (self.row == other.row) == (self.column == other.column):
            return None
        if self.row == other.row:
            return ("left", "right")[self.column > other.column]
        return ("above", "below")[self.row > other.row]


def draw_layout(rng: np.random.Generator, split: str) -> tuple[Item, ...]:
    """Draw 6 to 9 objects of a scene on a 4 x 4 grid.

    Plate colours and words are unique within a scene. One category may stand up to four times; the others once.

    Args:
        rng: Source of chance.
        split: "train" (no held-out word or pair) or "test" (held-out words only, at least one held-out pair).
    """
    total = int(rng.integers(6, 10))
    names = draw_categories(rng, total, int(rng.integers(1, 5)), split)
    cells = rng.permutation(CELLS * CELLS)[:total]
    plates = list(rng.permutation(COLOURS))[: int(rng.integers(3, 6))]
    words = list(rng.choice(WORDS[split], size=int(rng.integers(2, 5)), replace=False))
    with_plate, with_word = hand_out(rng, plates, total), hand_out(rng, words, total)
    return tuple(
        _place(rng, names[i], *divmod(int(cells[i]), CELLS), with_plate.get(i), with_word.get(i)) for i in range(total)
    )


def hand_out(rng: np.random.Generator, gifts: Sequence[str], total: int) -> dict[int, str]:
    """Give each gift to another one of `total` items."""
    return {int(i): str(gift) for i, gift in zip(rng.permutation(total), gifts, strict=False)}


def draw_categories(rng: np.random.Generator, total: int, copies: int, split: str) -> list[int]:
    """Categories of so many items, one of them `copies` times, the others once; what is repeated stands last."""
    names = _draw_different(rng, total - copies + 1, split)
    repeated = names[int(rng.integers(len(names)))]
    return names + [repeated] * (copies - 1)


def _draw_different(rng: np.random.Generator, count: int, split: str) -> list[int]:
    order = [int(i) for i in rng.permutation(len(CATEGORIES))]
    chosen = [order.pop()]
    if split == "test":  # start from one held-out pair; what else stands there is free
        partner = next(i for i in order if pair_is_held_out(CATEGORIES[i], CATEGORIES[chosen[0]]))
        order.remove(partner)
        return [*chosen, partner, *order[: count - 2]]
    for i in order:
        if len(chosen) == count:
            break
        if not any(pair_is_held_out(CATEGORIES[i], CATEGORIES[j]) for j in chosen):
            chosen.append(i)
    return chosen


def _place(
    rng: np.random.Generator, category: int, row: int, column: int, plate: str | None, word: str | None
) -> Item:
    room = 2 * PATCH_SIZE + 2 if word else CELL_SIZE
    size = int(rng.integers(30, 35)) if word else int(rng.integers(34, 45))
    left = column * CELL_SIZE + int(rng.integers(0, CELL_SIZE - size + 1))
    top = row * CELL_SIZE + int(rng.integers(0, max(room - size, 0) + 1))
    return Item(category, plate, word, (left, top, left + size, top + size), row, column)
