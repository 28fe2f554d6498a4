"""A scene: a picture, what stands in it, and questions about it. The same seed gives the same scene everywhere."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from grip_hf.pocket.drawing import draw_scene
from grip_hf.pocket.places import Item, draw_layout
from grip_hf.pocket.questions import Question, ask
from grip_hf.pocket.sprites import STYLES

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Scene:
    """A picture with what is known about it.

    Attributes:
        image: RGB, 192 x 192 pixels.
        items: The objects that stand in it.
        questions: About ten questions with answers and evidence.
    """

    image: Image.Image
    items: tuple[Item, ...]
    questions: tuple[Question, ...]


def make_scene(seed: int, split: str = "test", styles: tuple[str, ...] = STYLES[:2]) -> Scene:
    """Compose one scene.

    Args:
        seed: Any integer >= 0. Train and test scenes of one seed have nothing in common.
        split: "train" or "test"; the test split holds words and pairs of categories that no training scene has.
        styles: Art styles to draw from: "fluent", "google" (both trained on), "twitter" (never trained on).

    Raises:
        ValueError: For a negative seed, an unknown split or style.
    """
    if seed < 0:
        raise ValueError(f"seed={seed} must be >= 0")
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}")
    if not styles or set(styles) - set(STYLES):
        raise ValueError(f"styles={styles!r} must be one or more of {', '.join(STYLES)}")
    rng = np.random.default_rng([SPLITS.index(split), seed])
    items = draw_layout(rng, split)
    return Scene(draw_scene(rng, items, styles), items, ask(rng, items, split))
