"""Pictures of kept tokens, checked pixel by pixel."""

import numpy as np
import pytest
from PIL import Image

from grip_hf.viz import FRAME, contact_sheet, draw_kept


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
