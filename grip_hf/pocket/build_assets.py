"""Rebuild the shipped pictures from their public packages: `python -m grip_hf.pocket.build_assets --help`.

Needs, unpacked from npm: `@lobehub/fluent-emoji-3d` 1.1.0, `emoji-datasource` 16.0.0 and its `-google` and `-twitter`
art; and from PyPI: scikit-image 0.26 (photographs) and matplotlib (DejaVu fonts). Licences: `assets/LICENSES.md`.
"""

import argparse
import json
from importlib.resources import files
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from grip_hf.pocket.sprites import ASSETS, ATLAS_COLUMNS, GLYPH_SIZE, PHOTO_SIZE, PHOTOS, SPRITE_SIZE
from grip_hf.pocket.vocabulary import CATEGORIES, LETTERS

FONTS = ("DejaVuSans-Bold", "DejaVuSansMono-Bold", "DejaVuSerif-Bold")


def sprite_atlas(paths: list[Path]) -> Image.Image:
    """Paste one picture per category into a grid of RGBA cells of `SPRITE_SIZE` pixels."""
    rows = -(-len(paths) // ATLAS_COLUMNS)
    atlas = Image.new("RGBA", (ATLAS_COLUMNS * SPRITE_SIZE, rows * SPRITE_SIZE))
    for i, path in enumerate(paths):
        sprite = Image.open(path).convert("RGBA").resize((SPRITE_SIZE, SPRITE_SIZE), Image.Resampling.LANCZOS)
        atlas.paste(sprite, (i % ATLAS_COLUMNS * SPRITE_SIZE, i // ATLAS_COLUMNS * SPRITE_SIZE))
    return atlas


def glyph_atlas(font_folder: Path) -> Image.Image:
    """Draw the letters (columns) in each font (rows), centred in cells of `GLYPH_SIZE` pixels, as coverage."""
    atlas = Image.new("L", (len(LETTERS) * GLYPH_SIZE, len(FONTS) * GLYPH_SIZE))
    draw = ImageDraw.Draw(atlas)
    for row, name in enumerate(FONTS):
        font = ImageFont.truetype(font_folder / f"{name}.ttf", GLYPH_SIZE)
        for column, letter in enumerate(LETTERS):
            left, _, right, bottom = font.getbbox(letter, anchor="ls")
            x = column * GLYPH_SIZE + (GLYPH_SIZE - (right - left)) / 2 - left
            drop = bottom if letter in "gpqyj" else 0  # letters with a tail are lifted so that it stays in the cell
            draw.text((x, (row + 1) * GLYPH_SIZE - 2 - max(drop - 1, 0)), letter, fill=255, font=font, anchor="ls")
    return atlas


def photo_atlas(folder: Path) -> Image.Image:
    """Centre crops of the photographs, side by side."""
    atlas = Image.new("RGB", (len(PHOTOS) * PHOTO_SIZE, PHOTO_SIZE))
    for i, name in enumerate(PHOTOS):
        photo = Image.open(folder / name).convert("RGB")
        side = min(photo.size)
        left, top = (photo.width - side) // 2, (photo.height - side) // 2
        crop = photo.crop((left, top, left + side, top + side)).resize((PHOTO_SIZE, PHOTO_SIZE))
        atlas.paste(crop, (i * PHOTO_SIZE, 0))
    return atlas


def main() -> None:
    """Write the atlases into the package's own assets folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--npm", type=Path, required=True, help="folder that holds the unpacked npm packages")
    npm = parser.parse_args().npm
    records = json.loads((npm / "emoji-datasource-16.0.0/package/emoji.json").read_text())
    image = {record["short_name"]: record["image"] for record in records}
    fluent = npm / "lobehub-fluent-emoji-3d-1.1.0/package/assets"
    art = {
        "fluent": [_fluent(fluent, image[c]) for c in CATEGORIES],
        "google": [npm / "emoji-datasource-google-16.0.0/package/img/google/64" / image[c] for c in CATEGORIES],
        "twitter": [npm / "emoji-datasource-twitter-16.0.0/package/img/twitter/64" / image[c] for c in CATEGORIES],
    }
    for style, paths in art.items():
        sprite_atlas(paths).save(ASSETS / f"sprites_{style}.png", optimize=True)
    import matplotlib
    import skimage

    glyph_atlas(Path(matplotlib.get_data_path()) / "fonts/ttf").save(ASSETS / "glyphs.png", optimize=True)
    photo_atlas(Path(str(files(skimage) / "data"))).save(ASSETS / "photos.jpg", quality=80)


def _fluent(folder: Path, image: str) -> Path:
    stem = image.removesuffix(".png")
    candidates = [folder / f"{name}.webp" for name in (stem, stem.replace("-fe0f", ""), f"{stem}-fe0f")]
    return next(path for path in candidates if path.exists())


if __name__ == "__main__":
    main()
