"""From a layout of the second testbed to pixels: a photograph behind, distractors that are none of the objects."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from grip_hf.pocket.drawing import draw_item, draw_plate, draw_scrap, print_word, ramp
from grip_hf.pocket.places import Box
from grip_hf.pocket.scatter import IMAGE_SIZE, LETTER_SIZES, TRIES, Ground, Placed, as_box
from grip_hf.pocket.sprites import PHOTO_SIZE, photos, sprites
from grip_hf.pocket.vocabulary import COLOURS, LETTERS

PHOTO_SHARE = 0.85  # the other backgrounds are gradients
SCRAPS, PLATES, STRAYS = 6, 2, 2  # most distractors of each kind: scraps of objects, bare plates, pairs of letters


def paint_scene(rng: np.random.Generator, items: Sequence[Placed], styles: Sequence[str]) -> Image.Image:
    """Draw background, distractors, plates, objects and words as one RGB picture of 256 x 256 pixels.

    Distractors overlap neither objects nor words: bare plates in colours that no object has, scraps of objects, and
    pairs of letters, which are too short to be words.
    """
    canvas = _background(rng)
    ground = Ground()
    ground.bodies += [item.plate_box for item in items]
    ground.labels += [item.word_box for item in items if item.word_box]
    spare = [colour for colour in COLOURS if colour not in {item.plate for item in items}]
    for colour in rng.permutation(spare)[: int(rng.integers(PLATES + 1))]:
        side = int(rng.integers(20, 48))
        box = _find_room(rng, ground, side, side)
        if box is not None:
            draw_plate(rng, canvas, str(colour), box)
    for _ in range(int(rng.integers(SCRAPS + 1))):
        scrap = draw_scrap(rng, styles)
        scrap = scrap.resize((round(scrap.width * rng.uniform(1, 2)),) * 2, Image.Resampling.BILINEAR)
        box = _find_room(rng, ground, scrap.width, scrap.height)
        if box is not None:
            canvas.paste(scrap, box[:2], scrap)
    strays = []
    for _ in range(int(rng.integers(STRAYS + 1))):
        size = int(rng.integers(LETTER_SIZES[0], LETTER_SIZES[1] + 1))
        box = _find_room(rng, ground, 2 * size, size)
        if box is not None:
            strays.append(("".join(rng.choice(LETTERS, size=2)), box))
    for item in items:
        draw_item(rng, canvas, item, item.plate_box, sprites(str(rng.choice(styles))))
    pixels = np.array(canvas)
    for item in items:
        if item.word is not None and item.word_box is not None:
            print_word(rng, pixels, item.word, item.word_box)
    for text, box in strays:
        print_word(rng, pixels, text, box)
    return Image.fromarray(pixels)


def _background(rng: np.random.Generator) -> Image.Image:
    """A part of a photograph at some scale, turned and mirrored, or a gradient."""
    if rng.random() < PHOTO_SHARE:
        photo = photos()[int(rng.integers(len(photos())))]
        side = int(rng.integers(PHOTO_SIZE // 2, PHOTO_SIZE + 1))
        top, left = (int(v) for v in rng.integers(0, PHOTO_SIZE - side + 1, size=2))
        crop = Image.fromarray(np.rot90(photo[top : top + side, left : left + side], int(rng.integers(4))))
        crop = crop.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
        pixels = np.asarray(crop)[:, :: 1 if rng.random() < 0.5 else -1].astype(np.float32)
        pixels = 128 + (pixels - 128) * rng.uniform(0.4, 1) + rng.uniform(-30, 30)
    else:
        pixels = ramp(rng, IMAGE_SIZE, upright=rng.random() < 0.5)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _find_room(rng: np.random.Generator, ground: Ground, width: int, height: int) -> Box | None:
    """A place where a distractor overlaps nothing, then taken; None if chance finds none."""
    left = rng.integers(0, IMAGE_SIZE - width + 1, size=TRIES)
    top = rng.integers(0, IMAGE_SIZE - height + 1, size=TRIES)
    boxes = np.stack([left, top, left + width, top + height], 1)
    fits = np.flatnonzero(ground.free(boxes, None, overlap=0))
    if not len(fits):
        return None
    box = as_box(boxes[fits[0]])
    ground.bodies.append(box)
    return box
