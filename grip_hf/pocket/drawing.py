"""From a layout to pixels."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from grip_hf.pocket.places import CELL_SIZE, CELLS, IMAGE_SIZE, Box, Item, Thing
from grip_hf.pocket.sprites import GLYPH_SIZE, PHOTO_SIZE, glyphs, photos, sprites
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
        draw_item(rng, canvas, item, item.plate_box, sprites(str(rng.choice(styles))))
    pixels = np.array(canvas)
    for item in items:
        if item.word is not None:
            print_word(rng, pixels, item.word, item.word_box)
    return Image.fromarray(pixels)


def _background(rng: np.random.Generator) -> Image.Image:
    kind = rng.random()
    if kind < 0.5:
        photo = photos()[int(rng.integers(len(photos())))]
        top, left = (int(v) for v in rng.integers(0, PHOTO_SIZE - IMAGE_SIZE + 1, size=2))
        crop = photo[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
        pixels = 128 + (crop.astype(np.float32) - 128) * rng.uniform(0.4, 0.9) + rng.uniform(-30, 30)
    else:
        pixels = ramp(rng, IMAGE_SIZE, upright=kind < 0.75)
    return Image.fromarray(np.ascontiguousarray(np.clip(pixels, 0, 255).astype(np.uint8)))


def ramp(rng: np.random.Generator, size: int, upright: bool) -> np.ndarray:
    """A gradient between two colours with some grain, float32 `[size, size, 3]`."""
    steps = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
    ends = rng.uniform(60, 230, size=(2, 3)).astype(np.float32)
    pixels = np.broadcast_to(ends[0] * (1 - steps) + ends[1] * steps, (size, size, 3))
    pixels = pixels if upright else pixels.transpose(1, 0, 2)
    return pixels + rng.integers(-10, 11, size=(size, size, 1), dtype=np.int8)


def _clutter(rng: np.random.Generator, canvas: Image.Image, row: int, column: int, styles: Sequence[str]) -> None:
    scrap = draw_scrap(rng, styles)
    x, y = (int(v) for v in rng.integers(0, CELL_SIZE - scrap.width, size=2))
    canvas.paste(scrap, (column * CELL_SIZE + x, row * CELL_SIZE + y), scrap)


def draw_scrap(rng: np.random.Generator, styles: Sequence[str]) -> Image.Image:
    """A scrap of some object, too small to be one: what a careless scorer would keep. RGBA, 8 to 14 pixels a side."""
    art = sprites(str(rng.choice(styles)))[int(rng.integers(len(CATEGORIES)))]
    side = int(rng.integers(8, 15))
    left, top = (int(v) for v in rng.integers(0, art.width - side, size=2))
    return art.crop((left, top, left + side, top + side)).rotate(90 * int(rng.integers(4)))


def draw_item(
    rng: np.random.Generator, canvas: Image.Image, item: Thing, plate_box: Box, art: Sequence[Image.Image]
) -> None:
    """Draw one object on its plate, if it has one, in the art of a style."""
    if item.plate is not None:
        draw_plate(rng, canvas, item.plate, plate_box)
    size = item.box[2] - item.box[0]
    sprite = art[item.category].resize((size, size), Image.Resampling.BILINEAR)
    canvas.paste(sprite, item.box[:2], sprite)


def draw_plate(rng: np.random.Generator, canvas: Image.Image, colour: str, box: Box) -> None:
    """Draw a plate with round corners in a shade of its colour."""
    shade = rng.normal(0, 8, size=3)
    fill = tuple(int(np.clip(v + s, 0, 255)) for v, s in zip(PLATES[colour], shade, strict=True))
    ImageDraw.Draw(canvas).rounded_rectangle(box, radius=int(rng.integers(3, 12)), fill=fill)


def print_word(rng: np.random.Generator, pixels: np.ndarray, word: str, box: Box) -> None:
    """Print a word on a label strip into `[H, W, 3]` uint8 pixels, moved by up to one pixel of the font."""
    dark_on_light = rng.random() < 0.7
    ink, paper = (rng.uniform(0, 60), rng.uniform(205, 255))[:: 1 if dark_on_light else -1]
    font = glyphs()[int(rng.integers(len(glyphs())))]
    strip = np.concatenate([font[LETTERS.index(letter)] for letter in word], axis=1)
    shift = tuple(int(v) for v in rng.integers(-1, 2, size=2))
    strip = np.roll(strip, shift, axis=(0, 1))
    left, top, right, bottom = box
    if bottom - top != GLYPH_SIZE:
        size = (right - left, bottom - top)
        strip = np.asarray(Image.fromarray(strip).resize(size, Image.Resampling.BILINEAR))
    pixels[top:bottom, left:right] = (paper + (ink - paper) * strip)[..., None].astype(np.uint8)
