"""Pictures of kept tokens, checked pixel by pixel."""

import math

import numpy as np
import pytest
from PIL import Image

from grip_hf.viz import COLD, FRAME, HOT, contact_sheet, draw_kept, draw_scores


def test_kept_tokens_keep_their_pixels_and_dropped_ones_are_dimmed():
    image = Image.fromarray(np.full((40, 60, 3), 200, dtype=np.uint8))
    drawn = np.asarray(draw_kept(image, [0, 5], grid=(2, 3), dim=0.5))
    assert drawn.shape == (40, 60, 3)
    assert (drawn[5:15, 5:15] == 200).all() and (drawn[25:35, 45:55] == 200).all()
    assert (drawn[5:15, 25:35] == 100).all() and (drawn[25:35, 5:15] == 100).all()
    assert tuple(drawn[0, 0]) == FRAME and tuple(drawn[39, 59]) == FRAME


def test_size_scales_the_longer_side():
    assert draw_kept(Image.new("RGB", (60, 40)), [], (2, 3), size=120).size == (120, 80)


@pytest.mark.parametrize("kept", [[6], [-1]])
def test_tokens_outside_the_grid_are_refused(kept):
    with pytest.raises(ValueError, match=r"\[0, 6\)"):
        draw_kept(Image.new("RGB", (60, 40)), kept, (2, 3))


def test_contact_sheet_holds_every_picture():
    red, blue = Image.new("RGB", (100, 100), (255, 0, 0)), Image.new("RGB", (100, 100), (0, 0, 255))
    sheet = np.asarray(contact_sheet([[(red, "one\ntwo"), (blue, "b")], [(blue, "c")]]))
    assert (sheet == (255, 0, 0)).all(-1).sum() == 100 * 100
    assert (sheet == (0, 0, 255)).all(-1).sum() == 2 * 100 * 100
    with pytest.raises(ValueError, match="rows"):
        contact_sheet([[]])


def test_scores_are_laid_over_the_picture():
    grey = Image.new("RGB", (40, 20), (128, 128, 128))
    heat = draw_scores(grey, [0, 1, 2, 3, 4, 2, 2, -math.inf], (2, 4), strength=1)
    assert heat.size == (40, 20) and draw_scores(grey, [0, 1], (1, 2), size=80).size == (80, 40)
    centre = [[heat.getpixel((10 * column + 5, 10 * row + 5)) for column in range(4)] for row in range(2)]
    assert centre[0][0] == centre[1][3] == COLD and centre[1][0] == HOT  # the lowest, and the highest
    light = [sum(colour) for colour in centre[0]]
    assert light == sorted(set(light)) and centre[0][2] == centre[1][1] == centre[1][2]
    flat = draw_scores(grey, [7.0] * 4, (2, 2), strength=1)
    assert len(flat.getcolors()) == 1 and flat.getpixel((0, 0)) not in (COLD, HOT)
    assert draw_scores(grey, [0, 1], (1, 2), strength=0).tobytes() == grey.tobytes()


def test_bad_scores_are_refused():
    grey = Image.new("RGB", (40, 20))
    for arguments, said in (
        (([1.0] * 7, (2, 4)), "8 numbers.*got 7"),
        (([math.nan] * 8, (2, 4)), "NaN"),
        (([1.0] * 8, (2, 4), None, 2), "strength=2"),
    ):
        with pytest.raises(ValueError, match=said):
            draw_scores(grey, *arguments)
