"""Where things stand in a scene, as plain data: no pixels here."""

from dataclasses import dataclass

import numpy as np

from grip_hf.pocket.splits import WORDS, pair_is_held_out
from grip_hf.pocket.vocabulary import CATEGORIES, COLOURS, WORD_LENGTH

IMAGE_SIZE, PATCH_SIZE = 192, 16
PATCHES = IMAGE_SIZE // PATCH_SIZE  # 12 a side, so 144 visual tokens
CELLS = 4  # a side
CELL_PATCHES = PATCHES // CELLS  # 3 a side
CELL_SIZE = CELL_PATCHES * PATCH_SIZE  # 48 pixels


@dataclass(frozen=True)
class Item:
    """One object of a scene.

    Attributes:
        category: Index into `CATEGORIES`.
        row: Row of its cell, 0 to 3.
        column: Column of its cell, 0 to 3.
        plate: Colour name of the plate behind it, or None.
        word: The printed word below it, or None.
        box: Left, top, right, bottom of the drawn object in pixels.
    """

    category: int
    row: int
    column: int
    plate: str | None
    word: str | None
    box: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        """The category's word."""
        return CATEGORIES[self.category]

    @property
    def patches(self) -> tuple[int, ...]:
        """Visual tokens (row-major) that the object covers by at least half a patch both ways."""
        left, top, right, bottom = self.box
        half = PATCH_SIZE // 2
        columns = [c for c in range(PATCHES) if min(right, (c + 1) * PATCH_SIZE) - max(left, c * PATCH_SIZE) >= half]
        rows = [r for r in range(PATCHES) if min(bottom, (r + 1) * PATCH_SIZE) - max(top, r * PATCH_SIZE) >= half]
        return tuple(r * PATCHES + c for r in rows for c in columns)

    @property
    def centre(self) -> int:
        """The one visual token under the middle of the object."""
        left, top, right, bottom = self.box
        return (top + bottom) // 2 // PATCH_SIZE * PATCHES + (left + right) // 2 // PATCH_SIZE

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


def draw_layout(rng: np.random.Generator, split: str) -> tuple[Item, ...]:
    """Draw 6 to 9 objects of a scene on a 4 x 4 grid.

    Plate colours and words are unique within a scene. One category may stand up to four times; the others once.

    Args:
        rng: Source of chance.
        split: "train" (no held-out word or pair) or "test" (held-out words only, at least one held-out pair).
    """
    total = int(rng.integers(6, 10))
    copies = int(rng.integers(1, 5))
    names = _draw_categories(rng, total - copies + 1, split)
    repeated = names[int(rng.integers(len(names)))]
    names = names + [repeated] * (copies - 1)
    cells = rng.permutation(CELLS * CELLS)[:total]
    plates = list(rng.permutation(COLOURS))[: int(rng.integers(3, 6))]
    words = list(rng.choice(WORDS[split], size=int(rng.integers(2, 5)), replace=False))
    with_plate = {int(i): str(plate) for i, plate in zip(rng.permutation(total), plates, strict=False)}
    with_word = {int(i): str(word) for i, word in zip(rng.permutation(total), words, strict=False)}
    return tuple(
        _place(rng, names[i], *divmod(int(cells[i]), CELLS), with_plate.get(i), with_word.get(i)) for i in range(total)
    )


def _draw_categories(rng: np.random.Generator, count: int, split: str) -> list[int]:
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
    return Item(category, row, column, plate, word, (left, top, left + size, top + size))
