"""What one training step of the pocket model does: the losses of its stages."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from grip_hf.pocket.batches import WORD_IDS, Lesson, to_lesson
from grip_hf.pocket.dense import NAMED, DenseHeads
from grip_hf.pocket.guidance import LAYER, guidance_loss
from grip_hf.pocket.packing import IGNORE, Packed
from grip_hf.pocket.scenes import Scene
from grip_hf.pocket.testbeds import POCKET
from grip_hf.pocket.vocabulary import NUMBERS


class PocketTrainer(nn.Module):
    """The pocket model with its training heads; `forward` gives the loss of a stage, so that DDP can wrap it.

    Args:
        model: The pocket LLaVA.
    """

    testbed = POCKET
    stages: tuple[str, ...] = ("see", "speak", "both")
    worth: torch.Tensor

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        worth = torch.ones(len(self.testbed.words))
        worth[[WORD_IDS[number] for number in NUMBERS]] = 4.0  # counting is what it is slowest to learn
        self.register_buffer("worth", worth, persistent=False)
        self.heads: Any = self.make_heads()

    def make_heads(self) -> nn.Module:
        """The heads of dense supervision."""
        word_ids = {name: [WORD_IDS[word] for word in words] for name, words in NAMED.items()}
        language, tower = self.model.model.language_model, self.model.model.vision_tower
        return DenseHeads(word_ids, language.config.hidden_size, tower.config.hidden_size)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def schedule(self, progress: float, stage: str, step: int) -> float:
        """Set the weight of the guidance for a step of a stage; the share of visual tokens that stays in it."""
        self.guidance = 1.0 if progress < 0.5 else 0.3
        return 1.0 if stage == "see" or step % 3 else float(torch.rand(()) * 0.7 + 0.3)

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
        self, tokens: torch.Tensor, packed: Packed, keep: float, places: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Cross-entropy of the answers plus the guidance of `guidance_loss`."""
        kept = _kept(packed, keep) if places is None else None
        logits, guidance = self.speak(tokens, packed, kept, places)
        asked = packed.labels != IGNORE
        target = packed.labels[asked]
        answers = F.cross_entropy(logits[asked].float(), target, weight=self.worth)
        hit = (logits[asked].argmax(-1) == target).float().mean()
        return answers + self.guidance * guidance, {"answers": answers, "guidance": guidance, "hit": hit}

    guidance = 1.0  # weight of the guidance loss

    def speak(
        self,
        tokens: torch.Tensor,
        packed: Packed,
        kept: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[B, T, V]` at the question tokens, and the guidance loss.

        Args:
            tokens: Projected visual tokens `[B, N, D]`.
            packed: The questions.
            kept: Visual tokens that stay `[B, K]`, ascending; None keeps all. Positions stay the original ones.
            places: For smaller pictures, the visual token of the full one in whose place each stands `[B, N]`.
        """
        language = self.model.model.language_model
        batch, looks = len(tokens), packed.looks
        where = torch.arange(looks.shape[-1], device=tokens.device).expand(batch, -1) if places is None else places
        if kept is not None:
            tokens = tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[-1]))
            looks = looks.gather(2, kept[:, None].expand(-1, looks.shape[1], -1))
            where = kept
        embed = language.embed_tokens
        start = embed(torch.full((batch, 1), WORD_IDS["<s>"], device=tokens.device))
        states = torch.cat([start, tokens.to(start.dtype), embed(packed.ids)], 1)
        attention: Any = language.layers[LAYER].self_attn
        caught: dict[str, Any] = {}
        with attention.register_forward_pre_hook(lambda _, args, kwargs: caught.update(kwargs), with_kwargs=True):
            out = language(
                inputs_embeds=states,
                attention_mask=packed.attention_mask(where.shape[1]),
                position_ids=torch.cat([torch.zeros_like(where[:, :1]), 1 + where, packed.positions], 1),
                use_cache=False,
            ).last_hidden_state
        logits = self.model.lm_head(out[:, 1 + where.shape[1] :])
        if places is not None:  # the evidence is known at full resolution only
            return logits, logits.new_zeros(())
        return logits, guidance_loss(attention, caught, looks, packed.tallied)


def _kept(packed: Packed, keep: float) -> torch.Tensor | None:
    """A random keep-set `[B, K]` of visual tokens that holds every token some question looks at."""
    if keep >= 1:
        return None
    needed = packed.looks.any(1)
    count = max(round(keep * needed.shape[1]), int(needed.sum(-1).max()))
    order = torch.rand(needed.shape).to(needed.device) + needed
    return order.topk(count, dim=-1).indices.sort(-1).values


@torch.no_grad()
def count_right(trainer: PocketTrainer, scenes: Sequence[Scene], batch: int = 50) -> dict[str, tuple[int, int]]:
    """Right answers and questions per kind, greedy and exact.

    Runs with the true answer fed in: all its tokens win their argmax if and only if greedy decoding writes exactly it.
    """
    testbed = trainer.testbed
    right, asked = dict.fromkeys(testbed.kinds, 0), dict.fromkeys(testbed.kinds, 0)
    for first in range(0, len(scenes), batch):
        lesson = to_lesson(scenes[first : first + batch], testbed).to(trainer.device)
        tokens, _ = trainer.look(lesson.pixels)
        logits, _ = trainer.speak(tokens, lesson.packed)
        wrong = (logits.argmax(-1) != lesson.packed.labels) & (lesson.packed.labels != IGNORE)
        for b, kinds in enumerate(lesson.kinds):
            failed = set(lesson.packed.segment[b, wrong[b]].tolist())
            for s, kind in enumerate(kinds):
                asked[kind] += 1
                right[kind] += s not in failed
    return {kind: (right[kind], asked[kind]) for kind in testbed.kinds}
