"""Batches of fresh scenes as tensors, made by step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from grip_hf.pocket.dense import dense_labels
from grip_hf.pocket.packing import Packed, pack
from grip_hf.pocket.perception import patch_labels
from grip_hf.pocket.scenes import Scene, make_scene
from grip_hf.pocket.testbeds import DEFAULT, POCKET, POCKET2, Testbed

WORD_IDS = {token: i for i, token in enumerate(POCKET2.words)}  # the first testbed's words come first
AGAIN = 0.25  # share of the scenes of the second testbed that are seen at full resolution twice
SMALLER = range(2, 15)  # sides of its smaller pictures, in visual tokens


@dataclass
class Lesson:
    """A batch.

    Attributes:
        pixels: `[B, 3, H, H]`, uint8 or scaled to [-1, 1].
        dense: Labels `[B, N]` each.
        packed: Packed questions.
        kinds: Their kinds.
        side: Visual tokens on a side, in which the labels are given.
    """

    pixels: torch.Tensor
    dense: dict[str, torch.Tensor]
    packed: Packed
    kinds: list[list[str]]
    side: int

    def to(self, device: torch.device) -> "Lesson":
        """The same on a device, pixels scaled as the shipped image processor scales them."""
        packed = {f.name: getattr(self.packed, f.name).to(device, non_blocking=True) for f in fields(self.packed)}
        pixels = self.pixels.to(device, non_blocking=True)
        return replace(
            self,
            pixels=pixels.float().div(127.5).sub(1) if pixels.dtype == torch.uint8 else pixels,
            dense={name: labels.to(device, non_blocking=True) for name, labels in self.dense.items()},
            packed=Packed(**packed),
        )


def dense_targets(scenes: Sequence[Scene], testbed: Testbed, side: int) -> dict[str, torch.Tensor]:
    """Labels of dense supervision for pictures of `side` x `side` visual tokens, `[B, N]` each."""
    if testbed is POCKET:
        labels = [dense_labels(cast(Any, scene.items)) for scene in scenes]
    else:
        labels = [patch_labels(cast(Any, scene.items), side) for scene in scenes]
    return {name: torch.from_numpy(np.stack([label[name] for label in labels])) for name in labels[0]}


def to_lesson(scenes: Sequence[Scene], testbed: Testbed = DEFAULT) -> Lesson:
    """Turn scenes into tensors."""
    pixels = np.stack([np.asarray(scene.image) for scene in scenes]).transpose(0, 3, 1, 2)
    return Lesson(
        pixels=torch.from_numpy(np.ascontiguousarray(pixels)),
        dense=dense_targets(scenes, testbed, testbed.side),
        packed=pack([scene.questions for scene in scenes], WORD_IDS, testbed.tokens),
        kinds=[[question.kind for question in scene.questions] for scene in scenes],
        side=testbed.side,
    )


@dataclass(frozen=True)
class Lessons(Dataset):
    """Training batches by step; each scene's seed follows from step, rank and place alone.

    Attributes:
        batch: Scenes per step and process.
        rank: Of this process.
        world: Number of processes.
        seed: Of all scenes.
        testbed: Whose scenes.
    """

    batch: int
    rank: int = 0
    world: int = 1
    seed: int = 0
    testbed: Testbed = DEFAULT

    @property
    def views(self) -> int:
        """Steps per scene: the second testbed shows each at full resolution, then mostly at a smaller one."""
        return 1 if self.testbed is POCKET else 2

    def __getitem__(self, turn: int) -> list[Lesson]:
        """The batches of `views` steps on the same scenes."""
        first = self.seed * 100_000_000 + (turn * self.world + self.rank) * self.batch
        scenes = [make_scene(first + i, "train", testbed=self.testbed.name) for i in range(self.batch)]
        lesson = to_lesson(scenes, self.testbed)
        if self.testbed is POCKET:
            return [lesson]
        rng = np.random.default_rng([self.seed, turn])
        if rng.random() < AGAIN:
            return [lesson, lesson]
        side = int(rng.choice(SMALLER))
        return [lesson, replace(lesson, dense=dense_targets(scenes, self.testbed, side), side=side)]

    def run(self, start: int, stop: int, workers: int = 0) -> Iterator[Lesson]:
        """Batches of steps `start` to `stop`, made by so many processes beside this one."""
        turns = range(start // self.views, -(-stop // self.views))
        loader = DataLoader(self, batch_size=None, sampler=turns, num_workers=workers)
        lessons = (lesson for several in loader for lesson in several)
        return islice(lessons, start % self.views, start % self.views + stop - start)
