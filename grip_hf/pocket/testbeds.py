"""The two testbeds by name: what a scene is, what is asked, and where the trained model lies."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from grip_hf.pocket import places, scatter
from grip_hf.pocket.questions import CHANCE, QUESTION_KINDS
from grip_hf.pocket.questions2 import CHANCE2, QUESTION_KINDS2
from grip_hf.pocket.vocabulary import MORE, vocabulary

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Testbed:
    """One testbed.

    Attributes:
        name: By which it is loaded.
        image_size: Pixels on a side of a scene's picture.
        kinds: Kinds of questions.
        chance: Accuracy of the best answer that does not look at the picture, by kind.
        words: The tokenizer's tokens.
        weights: Folder of the shipped model and processor.
    """

    name: str
    image_size: int
    kinds: tuple[str, ...]
    chance: Mapping[str, float]
    words: tuple[str, ...]
    weights: Path

    @property
    def side(self) -> int:
        """Visual tokens on a side of a picture."""
        return self.image_size // places.PATCH_SIZE

    @property
    def tokens(self) -> int:
        """Visual tokens of a picture."""
        return self.side**2


POCKET = Testbed("pocket", places.IMAGE_SIZE, QUESTION_KINDS, CHANCE, vocabulary(), ASSETS / "model")
POCKET2 = Testbed("pocket2", scatter.IMAGE_SIZE, QUESTION_KINDS2, CHANCE2, vocabulary(MORE), ASSETS / "model2")
TESTBEDS = {testbed.name: testbed for testbed in (POCKET, POCKET2)}
DEFAULT = POCKET2  # the fairer one; the first answers several times as fast


def get_testbed(name: str) -> Testbed:
    """The testbed of this name.

    Raises:
        ValueError: There is none.
    """
    if name not in TESTBEDS:
        raise ValueError(f"testbed={name!r} must be one of {', '.join(TESTBEDS)}")
    return TESTBEDS[name]
