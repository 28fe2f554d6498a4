"""Questions about pocket scenes as examples: every kind equally often."""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, DatasetError, SourceError
from ..frozen.data import Example
from ..frozen.sources import load_model
from . import model as shipped
from .questions import Question
from .scenes import Scene, make_scene
from .sprites import STYLES
from .testbeds import DEFAULT, TESTBEDS, get_testbed

# Train scenes from here on were not used to train the pocket models.
FIRST_TRAIN_SCENE = 500_000_000
SCENES_PER_SEED = 1_000_000

cached_scene = lru_cache(maxsize=64)(make_scene)


class PocketExamples:
    """Rows of (scene, question): one row per kind and scene.

    Args:
        rows: How many.
        seed: Which scenes; seeds share none.
        split: "train" or "test".
        testbed: "pocket" or "pocket2".
        styles: Art styles of the scenes.

    Raises:
        ConfigError: `rows` or `seed` is out of range, or there is no such testbed.
    """

    def __init__(
        self,
        rows: int,
        seed: int = 0,
        split: str = "train",
        testbed: str = DEFAULT.name,
        styles: tuple[str, ...] = STYLES[:2],
    ) -> None:
        if testbed not in TESTBEDS:
            raise ConfigError(f"testbed must be one of {', '.join(TESTBEDS)}, got {testbed!r}")
        self.testbed, self.kinds = testbed, TESTBEDS[testbed].kinds
        if not 1 <= rows <= SCENES_PER_SEED * len(self.kinds):
            raise ConfigError(f"rows must be from 1 to {SCENES_PER_SEED * len(self.kinds)}, got {rows!r}")
        if seed < 0:
            raise ConfigError(f"seed must be >= 0, got {seed!r}")
        self.rows, self.split, self.styles = rows, split, styles
        self.first = seed * SCENES_PER_SEED + (FIRST_TRAIN_SCENE if split == "train" else 0)

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.rows

    def look(self, row: int) -> tuple[Scene, Question]:
        """The scene and the question of a row.

        A scene that lacks the row's kind is asked a question of the next kind that it has.

        Raises:
            DatasetError: There is no such row.
        """
        if not 0 <= row < self.rows:
            raise DatasetError(f"row must be from 0 to {self.rows - 1}, got {row}")
        place, turn = divmod(row, len(self.kinds))
        scene = cached_scene(self.first + place, self.split, self.styles, testbed=self.testbed)
        for kind in self.kinds[turn:] + self.kinds[:turn]:
            fitting = [question for question in scene.questions if question.kind == kind]
            if fitting:
                return scene, random.Random(f"{self.first}/{row}").choice(fitting)
        raise DatasetError(f"the scene of row {row} has no questions")

    def __getitem__(self, row: int) -> Example:
        """Return one row; its columns are `task` (the kind) and `evidence` (the tokens that hold the answer)."""
        scene, question = self.look(row)
        content = [{"type": "image", "image": scene.image}, {"type": "text", "text": question.text}]
        columns = {"task": question.kind, "evidence": oracle_order(scene, question)}
        return Example([{"role": "user", "content": content}], question.answer, columns)


class OnePerScene:
    """Held-out questions about scenes of their own, so that rows are independent; families take turns.

    Args:
        rows: How many.
        seed: Which scenes; seeds share none.
        testbed: "pocket" or "pocket2".
        styles: Art styles of the scenes.

    Raises:
        ConfigError: An argument is out of range, or there is no such testbed or style.
    """

    def __init__(
        self, rows: int, seed: int = 0, testbed: str = DEFAULT.name, styles: tuple[str, ...] = STYLES[:2]
    ) -> None:
        if not styles or set(styles) - set(STYLES):
            raise ConfigError(f"styles must be one or more of {STYLES}, got {styles!r}")
        if not 1 <= rows <= SCENES_PER_SEED:
            raise ConfigError(f"rows must be from 1 to {SCENES_PER_SEED}, got {rows!r}")
        self.all = PocketExamples(rows * len(get_testbed(testbed).kinds), seed, "test", testbed, styles)
        self.rows = rows

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.rows

    def __getitem__(self, row: int) -> Example:
        """Return one row."""
        count = len(self.all.kinds)
        return self.all[row * count + row % count]


def oracle_order(scene: Scene, question: Question) -> list[int]:
    """Visual tokens in the order in which one who knows the answer keeps them: evidence, then the other objects."""
    others = [token for item in scene.items for token in (item.centre, *item.letters)]
    rest = [token for item in scene.items for token in item.cell]
    return list(dict.fromkeys([*question.evidence, *others, *rest]))


def load_pocket_model(folder: str | Path | None = None, testbed: str = DEFAULT.name) -> tuple[Any, Any]:
    """The model that is shipped for a testbed, or another one of its kind from a folder, in float32.

    Raises:
        SourceError: There is none, or it is another testbed's.
    """
    if folder is None:
        try:
            return shipped.load_pocket(testbed)
        except (FileNotFoundError, ValueError) as error:
            raise SourceError(str(error)) from error
    model, processor = load_model(str(folder))
    size = model.config.get_text_config().vocab_size
    others = [one.name for one in TESTBEDS.values() if one.name != testbed and len(one.words) == size]
    if others:
        raise SourceError(f"the model in {folder} is one of testbed {others[0]!r}, not of {testbed!r}")
    return model.to(torch.float32), processor
