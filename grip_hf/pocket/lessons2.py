"""Training of the second testbed's model: mixed resolutions, and no lesson that ties visual tokens to words."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from grip_hf.pocket.batches import Lesson
from grip_hf.pocket.lessons import PocketTrainer
from grip_hf.pocket.perception import PatchHeads
from grip_hf.pocket.testbeds import POCKET, POCKET2

DENSE = 0.3  # weight of the tower's own lessons beside the answers
FADE = 0.6  # share of the last stage in which the guidance fades to nothing
DROP_EVERY = 8  # steps; in one of them tokens without evidence are dropped
LEAST_KEPT = 0.25  # share of the tokens that stay then, at least


class PocketTrainer2(PocketTrainer):
    """The losses of the second testbed.

    Stage "see" teaches the tower to tell what lies under each patch; stage "both" teaches everything by answers.
    """

    testbed = POCKET2
    stages = ("see", "both")

    def make_heads(self) -> nn.Module:
        """Classifiers on the tower's states."""
        return PatchHeads(self.model.model.vision_tower.config.hidden_size)

    def schedule(self, progress: float, stage: str, step: int) -> float:
        """Fade the guidance; now and then drop tokens without evidence, so that a pruned prompt is not foreign."""
        self.guidance = max(0.0, 1 - progress / FADE)
        return 1.0 if stage == "see" or step % DROP_EVERY else float(torch.rand(()) * (1 - LEAST_KEPT) + LEAST_KEPT)

    def states(self, pixels: torch.Tensor, side: int) -> torch.Tensor:
        """States `[B, 1 + side * side, V]` of the tower on pictures shrunk to side x side patches, [CLS] first."""
        pixels, full = shrink(pixels, side), side == self.testbed.side
        tower = self.model.model.vision_tower
        found = tower(pixels, output_hidden_states=True, interpolate_pos_encoding=not full).hidden_states
        return found[self.model.config.vision_feature_layer]

    def look(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Projected visual tokens `[B, 256, D]` and the [CLS] state `[B, V]`, at full resolution."""
        states = self.states(pixels, self.testbed.side)
        return self.model.model.multi_modal_projector(states[:, 1:]), states[:, 0]

    def forward(self, lesson: Lesson, stage: str, keep: float = 1.0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of one stage, "see" or "both", and what to report."""
        states = self.states(lesson.pixels, lesson.side)
        dense, report = self.heads.loss(states, lesson.dense)
        if stage == "see":
            return dense, report
        tokens, places = self.model.model.multi_modal_projector(states[:, 1:]), None
        if lesson.side != self.testbed.side:
            places = places_of(lesson.side, self.testbed.side, tokens.device).expand(len(tokens), -1)
        loss, answers = self.answer_loss(tokens, lesson.packed, keep, places)
        scale = (tokens.float().pow(2).mean(-1).sqrt() - 1).pow(2).mean()  # that of words, at the start
        if places is not None:  # say how it goes at full resolution only
            return loss + DENSE * dense + 0.1 * scale, {"smaller": answers["answers"]}
        return loss + DENSE * dense + 0.1 * scale, report | answers


def shrink(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Pictures of side x side patches, as evaluation makes its smaller pictures."""
    size = side * (pixels.shape[-1] // POCKET2.side)
    if size == pixels.shape[-1]:
        return pixels
    return F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)


def places_of(side: int, full: int, device: torch.device | None = None) -> torch.Tensor:
    """The patch of a full x full grid in the middle of each cell of a side x side grid: `[side * side]` int64."""
    middles = (2 * torch.arange(side, device=device) + 1) * full // (2 * side)
    return (middles[:, None] * full + middles).flatten()


def make_trainer(model: LlavaForConditionalGeneration, testbed: str) -> PocketTrainer:
    """The trainer of a testbed's model."""
    return PocketTrainer(model) if testbed == POCKET.name else PocketTrainer2(model)
