"""What one training step of the pocket model does: batches of fresh scenes, and the losses of both stages."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from grip_hf.pocket.dense import NAMED, TOKENS, DenseHeads, dense_labels
from grip_hf.pocket.guidance import LAYER, guidance_loss
from grip_hf.pocket.packing import IGNORE, PREFIX, Packed, pack
from grip_hf.pocket.questions import FAMILIES
from grip_hf.pocket.scenes import Scene, make_scene
from grip_hf.pocket.vocabulary import NUMBERS, vocabulary

WORD_IDS = {token: i for i, token in enumerate(vocabulary())}


@dataclass
class Lesson:
    """A batch: pixels `[B, 3, 192, 192]` in [-1, 1], dense labels `[B, 144]` each, packed questions and families."""

    pixels: torch.Tensor
    dense: dict[str, torch.Tensor]
    packed: Packed
    families: list[list[str]]


def to_lesson(scenes: Sequence[Scene]) -> Lesson:
    """Turn scenes into tensors. Pixels are scaled as the shipped image processor scales them."""
    pixels = np.stack([np.asarray(scene.image) for scene in scenes]).transpose(0, 3, 1, 2)
    labels = [dense_labels(scene.items) for scene in scenes]
    return Lesson(
        pixels=torch.from_numpy(np.ascontiguousarray(pixels)).float().div(127.5).sub(1),
        dense={name: torch.from_numpy(np.stack([label[name] for label in labels])) for name in labels[0]},
        packed=pack([scene.questions for scene in scenes], WORD_IDS),
        families=[[question.family for question in scene.questions] for scene in scenes],
    )


def lessons(start: int, stop: int, batch: int, rank: int, world: int, seed: int) -> Iterator[Lesson]:
    """Training batches of steps `start` to `stop`; each scene's seed follows from step, rank and place alone."""
    for step in range(start, stop):
        first = seed * 100_000_000 + (step * world + rank) * batch
        yield to_lesson([make_scene(first + i, "train") for i in range(batch)])


class PocketTrainer(nn.Module):
    """The pocket model with its training heads; `forward` gives the loss of a stage, so that DDP can wrap it.

    Args:
        model: The pocket LLaVA.
    """

    worth: torch.Tensor

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        worth = torch.ones(len(WORD_IDS))
        worth[[WORD_IDS[number] for number in NUMBERS]] = 4.0  # counting is what it is slowest to learn
        self.register_buffer("worth", worth, persistent=False)
        word_ids = {name: [WORD_IDS[word] for word in words] for name, words in NAMED.items()}
        language, tower = model.model.language_model, model.model.vision_tower
        self.heads = DenseHeads(word_ids, language.config.hidden_size, tower.config.hidden_size)

    def look(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Projected visual tokens `[B, 144, D]` and the [CLS] state `[B, V]`."""
        states = self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        layer = states[self.model.config.vision_feature_layer]
        return self.model.model.multi_modal_projector(layer[:, 1:]), layer[:, 0]

    def forward(self, lesson: Lesson, stage: str, keep: float = 1.0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of one stage and what to report.

        Args:
            lesson: The batch.
            stage: "see" (dense supervision alone), "speak" (questions, frozen tower) or "both".
            keep: Share of the visual tokens that the language model gets; evidence always stays.
        """
        words = self.model.model.language_model.embed_tokens.weight
        if stage == "see":
            tokens, cls = self.look(lesson.pixels)
            return self.heads.loss(tokens, cls, words.detach(), lesson.dense)
        with torch.set_grad_enabled(stage == "both"):
            tokens, cls = self.look(lesson.pixels)
        loss, report = self.answer_loss(tokens, lesson.packed, keep)
        if stage == "both":
            dense, accuracy = self.heads.loss(tokens, cls, words, lesson.dense)
            loss, report = loss + 0.5 * dense, report | accuracy
        return loss, report

    def answer_loss(
        self, tokens: torch.Tensor, packed: Packed, keep: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Cross-entropy of the answers plus the guidance of `guidance_loss`."""
        kept = _kept(packed, keep)
        logits, guidance = self.speak(tokens, packed, kept)
        asked = packed.labels != IGNORE
        target = packed.labels[asked]
        answers = F.cross_entropy(logits[asked].float(), target, weight=self.worth)
        hit = (logits[asked].argmax(-1) == target).float().mean()
        return answers + self.guidance * guidance, {"answers": answers, "guidance": guidance, "hit": hit}

    guidance = 1.0  # weight of the guidance loss

    def speak(
        self, tokens: torch.Tensor, packed: Packed, kept: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[B, T, V]` at the question tokens, and the guidance loss.

        Args:
            tokens: Projected visual tokens `[B, 144, D]`.
            packed: The questions.
            kept: Visual tokens that stay `[B, K]`, ascending; None keeps all. Positions stay the original ones.
        """
        language = self.model.model.language_model
        batch = len(tokens)
        mask, looks = packed.attention_mask(), packed.looks
        places = torch.arange(PREFIX, device=tokens.device).expand(batch, -1)
        if kept is not None:
            tokens = tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[-1]))
            looks = looks.gather(2, kept[:, None].expand(-1, looks.shape[1], -1))
            places = torch.cat([places[:, :1], 1 + kept], 1)
            columns = torch.cat([places, PREFIX + torch.arange(packed.ids.shape[1]).expand(batch, -1)], 1)
            mask = torch.stack([m[:, c][:, :, c] for m, c in zip(mask, columns, strict=True)])
        embed = language.embed_tokens
        start = embed(torch.full((batch, 1), WORD_IDS["<s>"], device=tokens.device))
        states = torch.cat([start, tokens.to(start.dtype), embed(packed.ids)], 1)
        attention: Any = language.layers[LAYER].self_attn
        caught: dict[str, Any] = {}
        with attention.register_forward_pre_hook(lambda _, args, kwargs: caught.update(kwargs), with_kwargs=True):
            out = language(
                inputs_embeds=states,
                attention_mask=mask,
                position_ids=torch.cat([places, packed.positions], 1),
                use_cache=False,
            ).last_hidden_state
        logits = self.model.lm_head(out[:, places.shape[1] :])
        return logits, guidance_loss(attention, caught, looks, packed.tallied)


def _kept(packed: Packed, keep: float) -> torch.Tensor | None:
    """A random keep-set `[B, K]` of visual tokens that holds every token some question looks at."""
    if keep >= 1:
        return None
    needed = packed.looks.any(1)
    count = max(round(keep * TOKENS), int(needed.sum(-1).max()))
    order = torch.rand(needed.shape) + needed
    return order.topk(count, dim=-1).indices.sort(-1).values


@torch.no_grad()
def score(trainer: PocketTrainer, scenes: Sequence[Scene], batch: int = 50) -> dict[str, tuple[int, int]]:
    """Right answers and questions per family, greedy and exact.

    Runs with the true answer fed in: all its tokens win their argmax if and only if greedy decoding writes exactly it.
    """
    right, asked = dict.fromkeys(FAMILIES, 0), dict.fromkeys(FAMILIES, 0)
    for first in range(0, len(scenes), batch):
        lesson = to_lesson(scenes[first : first + batch])
        tokens, _ = trainer.look(lesson.pixels)
        logits, _ = trainer.speak(tokens, lesson.packed)
        wrong = (logits.argmax(-1) != lesson.packed.labels) & (lesson.packed.labels != IGNORE)
        for b, families in enumerate(lesson.families):
            failed = set(lesson.packed.segment[b, wrong[b]].tolist())
            for s, family in enumerate(families):
                asked[family] += 1
                right[family] += s not in failed
    return {family: (right[family], asked[family]) for family in FAMILIES}
