"""Pictures of visual tokens: which were kept, and the scores behind them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

FRAME = (255, 60, 60)
INK, PAPER = (30, 30, 30), (255, 255, 255)
COLD, WARM, HOT = (13, 8, 80), (204, 71, 120), (252, 253, 160)  # of the heat map, from the lowest score to the highest


def draw_kept(
    image: Image.Image, kept: Iterable[int], grid: tuple[int, int], size: int | None = None, dim: float = 0.75
) -> Image.Image:
    """Draw which visual tokens were kept on the picture that they come from.

    Args:
        image: The picture, any size; only its whole area must be what the tokens cover.
        kept: Indices of the kept tokens, row-major, 0 <= index < rows * columns.
        grid: Rows and columns of visual tokens.
        size: Longer side of the result in pixels; None keeps the picture's own.
        dim: How dark a dropped token gets, from 0 (not at all) to 1 (black).

    Returns:
        A new RGB picture.

    Raises:
        ValueError: An index lies outside the grid, or `dim` outside [0, 1].
    """
    rows, columns = grid
    chosen = sorted(int(index) for index in kept)
    if chosen and not 0 <= chosen[0] <= chosen[-1] < rows * columns:
        raise ValueError(f"kept={chosen!r} must lie in [0, {rows * columns}) for a grid of {rows} x {columns} tokens")
    if not 0 <= dim <= 1:
        raise ValueError(f"dim={dim!r} must lie in [0, 1]")
    picture = _resized(image, size)
    result = Image.blend(picture, Image.new("RGB", picture.size), dim)
    draw = ImageDraw.Draw(result)
    for index in chosen:
        row, column = divmod(index, columns)
        left, right = (round(picture.width * c / columns) for c in (column, column + 1))
        top, bottom = (round(picture.height * r / rows) for r in (row, row + 1))
        result.paste(picture.crop((left, top, right, bottom)), (left, top))
        draw.rectangle((left, top, right - 1, bottom - 1), outline=FRAME)
    return result


def draw_scores(
    image: Image.Image,
    scores: Iterable[float],
    grid: tuple[int, int],
    size: int | None = None,
    strength: float = 0.7,
) -> Image.Image:
    """Lay the scores of the visual tokens over the picture that they come from, as a heat map.

    The lowest finite score is dark blue and the highest bright yellow; where all are equal, all are in the middle.

    Args:
        image: The picture, any size; only its whole area must be what the tokens cover.
        scores: One per visual token, row-major, of any scale; -inf and inf are shown as the lowest and the highest.
        grid: Rows and columns of visual tokens.
        size: Longer side of the result in pixels; None keeps the picture's own.
        strength: How much of the heat map covers the (grey) picture, from 0 to 1.

    Returns:
        A new RGB picture.

    Raises:
        ValueError: The scores are not as many as the grid has tokens, one is NaN, or `strength` lies outside [0, 1].
    """
    rows, columns = grid
    values = [float(score) for score in scores]
    if len(values) != rows * columns or any(map(math.isnan, values)):
        wrong = "one is NaN" if len(values) == rows * columns else f"got {len(values)}"
        raise ValueError(f"scores must be {rows * columns} numbers, for a grid of {rows} x {columns} tokens; {wrong}")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength={strength!r} must lie in [0, 1]")
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    clipped = [min(max(value, low), high) for value in values]
    heat = Image.new("L", (columns, rows))
    heat.putdata([round(255 * (value - low) / (high - low)) if high > low else 128 for value in clipped])
    picture = _resized(image, size)
    colours = ImageOps.colorize(heat.resize(picture.size, Image.Resampling.NEAREST), COLD, HOT, WARM)
    return Image.blend(ImageOps.grayscale(picture).convert("RGB"), colours, strength)


def _resized(image: Image.Image, size: int | None) -> Image.Image:
    """The picture in RGB, its longer side `size` pixels long (None: as it is)."""
    picture = image.convert("RGB")
    if size is None:
        return picture
    scale = size / max(picture.size)
    sides = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(sides, Image.Resampling.LANCZOS)


def contact_sheet(rows: Sequence[Sequence[tuple[Image.Image, str]]], margin: int = 12) -> Image.Image:
    """Arrange captioned pictures of one size in rows.

    Args:
        rows: Per row its (picture, caption) pairs; a caption may have several lines.
        margin: Pixels between pictures.
    """
    if not rows or not all(rows):
        raise ValueError("rows must hold at least one picture each")
    width, height = rows[0][0][0].size
    letter = max(11, width // 18)
    font = ImageFont.load_default(size=letter)
    lines = max(caption.count("\n") + 1 for row in rows for _, caption in row)
    step_x, step_y = width + margin, height + margin + lines * (letter + 5)
    sheet = Image.new("RGB", (max(map(len, rows)) * step_x + margin, len(rows) * step_y + margin), PAPER)
    draw = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows):
        for c, (picture, caption) in enumerate(row):
            x, y = margin + c * step_x, margin + r * step_y
            sheet.paste(picture, (x, y))
            draw.multiline_text((x, y + height + 4), caption, fill=INK, font=font, spacing=4)
    return sheet
