"""The shipped pictures: objects in three art styles, letters, photographs for backgrounds."""

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from grip_hf.pocket.vocabulary import CATEGORIES, LETTERS

ASSETS = Path(__file__).parent / "assets"
STYLES = ("fluent", "google", "twitter")  # the last one is never trained on
SPRITE_SIZE, GLYPH_SIZE, PHOTO_SIZE, ATLAS_COLUMNS = 48, 16, 256, 10
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "grass.png", "gravel.png", "brick.png", "rocket.jpg")


@cache
def sprites(style: str) -> tuple[Image.Image, ...]:
    """One RGBA picture of 48 x 48 pixels per category, in the order of `CATEGORIES`."""
    if style not in STYLES:
        raise ValueError(f"style={style!r} is unknown; choose one of {', '.join(STYLES)}")
    atlas = Image.open(ASSETS / f"sprites_{style}.png").convert("RGBA")
    corners = [divmod(i, ATLAS_COLUMNS) for i in range(len(CATEGORIES))]
    return tuple(
        atlas.crop((c * SPRITE_SIZE, r * SPRITE_SIZE, (c + 1) * SPRITE_SIZE, (r + 1) * SPRITE_SIZE))
        for r, c in corners
    )


@cache
def glyphs() -> np.ndarray:
    """Letter coverage, float32 `[fonts, 26, 16, 16]` in [0, 1]."""
    atlas = np.asarray(Image.open(ASSETS / "glyphs.png"), dtype=np.float32) / 255
    fonts = atlas.shape[0] // GLYPH_SIZE
    return atlas.reshape(fonts, GLYPH_SIZE, len(LETTERS), GLYPH_SIZE).transpose(0, 2, 1, 3)


@cache
def photos() -> np.ndarray:
    """Photographs, uint8 `[photos, 256, 256, 3]`."""
    strip = np.asarray(Image.open(ASSETS / "photos.jpg").convert("RGB"))
    return strip.reshape(PHOTO_SIZE, len(PHOTOS), PHOTO_SIZE, 3).transpose(1, 0, 2, 3)
