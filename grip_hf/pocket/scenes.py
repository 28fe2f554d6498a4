"""A scene: a picture, what stands in it, and questions about it. The same seed gives the same scene everywhere."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from grip_hf.pocket.drawing import draw_scene
from grip_hf.pocket.painting import paint_scene
from grip_hf.pocket.places import Item, draw_layout
from grip_hf.pocket.questions import Question, ask
from grip_hf.pocket.questions2 import ask_more
from grip_hf.pocket.scatter import Placed, draw_places
from grip_hf.pocket.sprites import STYLES
from grip_hf.pocket.testbeds import DEFAULT, POCKET2, get_testbed

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Scene:
    """A picture with what is known about it.

    Attributes:
        image: RGB, 192 x 192 pixels; 256 x 256 in the second testbed.
        items: The objects that stand in it.
        questions: About ten questions with answers and evidence; train scenes of the second testbed have about twenty.
    """

    image: Image.Image
    items: tuple[Item, ...] | tuple[Placed, ...]
    questions: tuple[Question, ...]


def make_scene(
    seed: int, split: str = "test", styles: tuple[str, ...] = STYLES[:2], testbed: str = DEFAULT.name
) -> Scene:
    """Compose one scene.

    Args:
        seed: Any integer >= 0. Train and test scenes of one seed have nothing in common.
        split: "train" or "test"; the test split holds words and pairs of categories that no training scene has.
        styles: Art styles to draw from: "fluent", "google" (both trained on), "twitter" (never trained on).
        testbed: "pocket" (objects on a 4 x 4 grid) or "pocket2" (objects at any place and of any size).

    Raises:
        ValueError: For a negative seed, an unknown split, style or testbed.
    """
    if seed < 0:
        raise ValueError(f"seed={seed} must be >= 0")
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}")
    if not styles or set(styles) - set(STYLES):
        raise ValueError(f"styles={styles!r} must be one or more of {', '.join(STYLES)}")
    if get_testbed(testbed) is POCKET2:
        return _make_scene2(np.random.default_rng([SPLITS.index(split), seed, 2]), split, styles)
    rng = np.random.default_rng([SPLITS.index(split), seed])
    items = draw_layout(rng, split)
    return Scene(draw_scene(rng, items, styles), items, ask(rng, items, split))


def _make_scene2(rng: np.random.Generator, split: str, styles: tuple[str, ...]) -> Scene:
    items = draw_places(rng, split)
    image = paint_scene(rng, items, styles)
    asked = [question for _ in range(2 if split == "train" else 1) for question in ask_more(rng, items, split)]
    return Scene(image, items, tuple({question.text: question for question in asked}.values()))
