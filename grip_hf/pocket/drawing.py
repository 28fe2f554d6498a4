"""From a layout to pixels."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from grip_hf.pocket.places import CELL_SIZE, CELLS, IMAGE_SIZE, PATCH_SIZE, Item
from grip_hf.pocket.sprites import PHOTO_SIZE, glyphs, photos, sprites
from grip_hf.pocket.vocabulary import CATEGORIES, LETTERS, PLATES


def draw_scene(rng: np.random.Generator, items: Sequence[Item], styles: Sequence[str]) -> Image.Image:
    """Draw background, clutter, plates, objects and words as one RGB picture of 192 x 192 pixels."""
    canvas = _background(rng)
    taken = {(item.row, item.column) for item in items}
    free = [(r, c) for r in range(CELLS) for c in range(CELLS) if (r, c) not in taken]
    for row, column in free:
        if rng.random() < 0.5:
            _clutter(rng, canvas, row, column, styles)
    for item in items:
        _draw_item(rng, canvas, item, sprites(str(rng.choice(styles))))
    return _print_words(rng, canvas, items)


def _background(rng: np.random.Generator) -> Image.Image:
    kind = rng.random()
    if kind < 0.5:
        photo = photos()[int(rng.integers(len(photos())))]
        top, left = (int(v) for v in rng.integers(0, PHOTO_SIZE - IMAGE_SIZE + 1, size=2))
        crop = photo[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
        pixels = 128 + (crop.astype(np.float32) - 128) * rng.uniform(0.4, 0.9) + rng.uniform(-30, 30)
    else:
        ramp = np.linspace(0, 1, IMAGE_SIZE, dtype=np.float32)[:, None, None]
        ends = rng.uniform(60, 230, size=(2, 3)).astype(np.float32)
        pixels = np.broadcast_to(ends[0] * (1 - ramp) + ends[1] * ramp, (IMAGE_SIZE, IMAGE_SIZE, 3))
        pixels = pixels if kind < 0.75 else pixels.transpose(1, 0, 2)
        grain = rng.integers(-10, 11, size=(IMAGE_SIZE, IMAGE_SIZE, 1), dtype=np.int8)
        pixels = pixels + grain
    return Image.fromarray(np.ascontiguousarray(np.clip(pixels, 0, 255).astype(np.uint8)))


def _clutter(rng: np.random.Generator, canvas: Image.Image, row: int, column: int, styles: Sequence[str]) -> None:
    """A scrap of some object, too small to be one: what a careless scorer would keep."""
    art = sprites(str(rng.choice(styles)))[int(rng.integers(len(CATEGORIES)))]
    side = int(rng.integers(8, 15))
    left, top = (int(v) for v in rng.integers(0, art.width - side, size=2))
    scrap = art.crop((left, top, left + side, top + side)).rotate(90 * int(rng.integers(4)))
    x, y = (int(v) for v in rng.integers(0, CELL_SIZE - side, size=2))
    canvas.paste(scrap, (column * CELL_SIZE + x, row * CELL_SIZE + y), scrap)


def _draw_item(rng: np.random.Generator, canvas: Image.Image, item: Item, art: Sequence[Image.Image]) -> None:
    left, top = item.column * CELL_SIZE, item.row * CELL_SIZE
    if item.plate is not None:
        shade = rng.normal(0, 8, size=3)
        colour = tuple(int(np.clip(v + s, 0, 255)) for v, s in zip(PLATES[item.plate], shade, strict=True))
        box = (left + 1, top + 1, left + CELL_SIZE - 2, top + CELL_SIZE - 2)
        ImageDraw.Draw(canvas).rounded_rectangle(box, radius=int(rng.integers(3, 12)), fill=colour)
    size = item.box[2] - item.box[0]
    sprite = art[item.category].resize((size, size), Image.Resampling.BILINEAR)
    canvas.paste(sprite, item.box[:2], sprite)


def _print_words(rng: np.random.Generator, canvas: Image.Image, items: Sequence[Item]) -> Image.Image:
    """Each word on a label strip, one letter a patch, moved by up to one pixel."""
    pixels = np.array(canvas)
    for item in items:
        if item.word is None:
            continue
        dark_on_light = rng.random() < 0.7
        ink, paper = (rng.uniform(0, 60), rng.uniform(205, 255))[:: 1 if dark_on_light else -1]
        font = glyphs()[int(rng.integers(len(glyphs())))]
        strip = np.concatenate([font[LETTERS.index(letter)] for letter in item.word], axis=1)
        shift = tuple(int(v) for v in rng.integers(-1, 2, size=2))
        strip = np.roll(strip, shift, axis=(0, 1))
        left, bottom = item.column * CELL_SIZE, (item.row + 1) * CELL_SIZE
        target = pixels[bottom - PATCH_SIZE : bottom, left : left + CELL_SIZE]
        target[:] = (paper + (ink - paper) * strip)[..., None].astype(np.uint8)
    return Image.fromarray(pixels)
