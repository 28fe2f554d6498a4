"""Where things stand in a scene of the second testbed: any place, any size, no lattice, little overlap."""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np

from grip_hf.pocket.places import PATCH_SIZE, Box, Thing, draw_categories, hand_out, token_at
from grip_hf.pocket.splits import WORDS
from grip_hf.pocket.vocabulary import COLOURS, COLUMNS, LETTERS, ROWS, WORD_LENGTH

IMAGE_SIZE = 256
SIDE = IMAGE_SIZE // PATCH_SIZE  # 16 a side, so 256 visual tokens
FEWEST, MOST = 4, 12  # objects
SMALLEST, LARGEST = 28, 96  # pixels on a side of an object
LETTER_SIZES = (16, 24)  # pixels; a letter is no narrower than a patch, so that no two middles share one
OVERLAP = 0.12  # of the smaller of two objects, at most
MARGIN = 16  # pixels between an object's middle and the middle of the picture, to be in a corner
TRIES = 24  # places per attempt


@dataclass(frozen=True)
class Placed(Thing):
    """One object anywhere in the picture.

    Attributes:
        plate_box: Of the plate behind it, or the object's own box where there is none.
        word_box: Of the printed word below it, or None.
    """

    plate_box: Box
    word_box: Box | None

    side: ClassVar[int] = SIDE

    @property
    def size(self) -> int:
        """Pixels on a side of the object."""
        return self.box[2] - self.box[0]

    @property
    def letter_middles(self) -> tuple[tuple[float, float], ...]:
        """Middle of each letter of the word in pixels: x, y."""
        if self.word_box is None:
            return ()
        left, top, right, bottom = self.word_box
        return tuple((left + (i + 0.5) * (right - left) / WORD_LENGTH, (top + bottom) / 2) for i in range(WORD_LENGTH))

    @property
    def letters(self) -> tuple[int, ...]:
        """The visual tokens under the middles of the word's letters; empty without a word."""
        return tuple(token_at(x, y, SIDE, PATCH_SIZE) for x, y in self.letter_middles)

    @property
    def cell(self) -> tuple[int, ...]:
        """All visual tokens that the object, its plate or its word touches."""
        return tuple(dict.fromkeys(t for box in (self.plate_box, self.word_box) if box for t in touched_at(box, SIDE)))

    @property
    def corner(self) -> str | None:
        """The quarter of the picture that it stands in; None near the middle lines."""
        x, y = (axis - IMAGE_SIZE / 2 for axis in self.middle)
        return None if min(abs(x), abs(y)) < MARGIN else f"{ROWS[y > 0]} {COLUMNS[x > 0]}"

    def seen_from(self, other: "Placed") -> str | None:
        """On which side of another object it stands; None where that is hard to say."""
        x, y = (mine - theirs for mine, theirs in zip(self.middle, other.middle, strict=True))
        if max(abs(x), abs(y)) < max(24, 1.5 * min(abs(x), abs(y))):
            return None
        return ("left", "right")[x > 0] if abs(x) > abs(y) else ("above", "below")[y > 0]


def touched_at(box: Box, side: int) -> tuple[int, ...]:
    """Visual tokens that a box touches, where the picture is cut into side x side."""
    columns, rows = (range(box[i] * side // IMAGE_SIZE, -(-box[i + 2] * side // IMAGE_SIZE)) for i in (0, 1))
    return tuple(r * side + c for r in rows for c in columns)


def draw_places(rng: np.random.Generator, split: str) -> tuple[Placed, ...]:
    """Draw 4 to 12 objects of a scene at any place and of any size, the larger ones first.

    Plate colours and words are unique within a scene. One category may stand up to four times; the others once.

    Args:
        rng: Source of chance.
        split: "train" (no held-out word or pair) or "test" (held-out words only, at least one held-out pair).
    """
    total = int(rng.integers(FEWEST, MOST + 1))
    names = draw_categories(rng, total, int(rng.integers(1, min(total - 1, 4) + 1)), split)
    names = [names[i] for i in rng.permutation(total)]
    plates = hand_out(rng, list(rng.permutation(COLOURS))[: int(rng.integers(2, min(total, 6) + 1))], total)
    words = hand_out(rng, _draw_words(rng, int(rng.integers(2, min(total, 5) + 1)), split), total)
    largest = min(LARGEST, 0.9 * IMAGE_SIZE / total**0.5)
    while True:
        sizes = np.exp(rng.uniform(np.log(SMALLEST), np.log(largest), size=total)).astype(int)
        sizes[::-1].sort()
        ground, placed = Ground(), []
        for i, size in enumerate(sizes):
            item = _place(rng, ground, names[i], int(size), plates.get(i), words.get(i))
            if item is None:
                break
            placed.append(item)
        if len(placed) == total:
            return tuple(placed)
        largest = max(0.9 * largest, SMALLEST + 1)


class Ground:
    """What is taken: objects with their plates may overlap a little, words not at all."""

    def __init__(self) -> None:
        self.bodies: list[Box] = []
        self.labels: list[Box] = []

    def free(self, bodies: np.ndarray, labels: np.ndarray | None, overlap: float = OVERLAP) -> np.ndarray:
        """Which candidates fit.

        Args:
            bodies: Boxes `[K, 4]` of candidates.
            labels: Boxes of their words `[K, 4]`, or None.
            overlap: Share of the smaller of two bodies that may be shared.

        Returns:
            `[K]` bool.
        """
        taken, words = (np.array(boxes).reshape(-1, 4) for boxes in (self.bodies, self.labels))
        smaller = np.minimum(area(bodies)[:, None], area(taken))
        fits = (shared(bodies, taken) <= overlap * smaller).all(1) & (shared(bodies, words) == 0).all(1)
        if labels is not None:
            fits &= (shared(labels, np.concatenate([taken, words])) == 0).all(1)
            fits &= (labels[:, :2] >= 0).all(1) & (labels[:, 2:] <= IMAGE_SIZE).all(1)
        return fits


def area(boxes: np.ndarray) -> np.ndarray:
    """Areas of boxes `[K, 4]`."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def shared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Areas that boxes `[K, 4]` and `[M, 4]` share, `[K, M]`."""
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    sides = np.maximum(sides, 0)
    return sides[..., 0] * sides[..., 1]


def _place(
    rng: np.random.Generator, ground: Ground, category: int, size: int, plate: str | None, word: str | None
) -> Placed | None:
    """One object where there is room for it, shrunk if need be; None where there is none."""
    rim = int(rng.integers(3, 8)) if plate else 0
    letter = int(rng.integers(LETTER_SIZES[0], LETTER_SIZES[1] + 1))
    while True:
        full = size + 2 * rim
        corner = rng.integers(0, IMAGE_SIZE - full + 1, size=(TRIES, 2))
        bodies = np.concatenate([corner, corner + full], 1)
        labels = None
        if word is not None:
            left = corner[:, :1] + (full - WORD_LENGTH * letter) // 2 + rng.integers(-6, 7, size=(TRIES, 1))
            top = corner[:, 1:] + full + rng.integers(0, 4, size=(TRIES, 1))
            labels = np.concatenate([left, top, left + WORD_LENGTH * letter, top + letter], 1)
        fits = np.flatnonzero(ground.free(bodies, labels))
        if len(fits):
            body = as_box(bodies[fits[0]])
            label = None if labels is None else as_box(labels[fits[0]])
            ground.bodies.append(body)
            ground.labels += [] if label is None else [label]
            box = (body[0] + rim, body[1] + rim, body[2] - rim, body[3] - rim)
            return Placed(category, plate, word, box, body, label)
        if size == SMALLEST:
            return None
        size, letter = max(SMALLEST, int(0.8 * size)), LETTER_SIZES[0]


def as_box(row: np.ndarray) -> Box:
    """A row of an array of boxes as a tuple."""
    left, top, right, bottom = (int(v) for v in row)
    return left, top, right, bottom


def _draw_words(rng: np.random.Generator, count: int, split: str) -> list[str]:
    """Different words; half of the time the second differs from the first in one letter only."""
    words = [str(word) for word in rng.choice(WORDS[split], size=count, replace=False)]
    near = [word for word in _neighbours(words[0], split) if word not in words]
    if rng.random() < 0.5 and near:
        words[1] = near[int(rng.integers(len(near)))]
    return words


@cache
def _neighbours(word: str, split: str) -> tuple[str, ...]:
    known = _known(split)
    changed = (word[:i] + letter + word[i + 1 :] for i in range(WORD_LENGTH) for letter in LETTERS)
    return tuple(other for other in changed if other != word and other in known)


@cache
def _known(split: str) -> frozenset[str]:
    return frozenset(WORDS[split])
