"""All questions of a scene in one sequence: each sees the picture and itself, as if it were asked alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from grip_hf.pocket.dense import TOKENS
from grip_hf.pocket.questions import Question

PREFIX = 1 + TOKENS  # <s> and the visual tokens, of the first testbed
IGNORE = -100
TALLIED = ("presence", "count")  # questions whose last word looks at the middle of every object that it names


@dataclass
class Packed:
    """A batch of packed question sequences about N visual tokens; T is the longest, right-padded.

    Attributes:
        ids: Question and answer tokens `[B, T]` int64, padding 0.
        labels: Next-token targets `[B, T]`, -100 where nothing is asked.
        positions: Position ids `[B, T]`.
        segment: Index of the question a token belongs to `[B, T]`, -1 at padding.
        looks: Evidence for grounding `[B, T, N]` bool; all False where nothing is known.
        tallied: Words whose `looks` are all there is of their kind, none included `[B, T]` bool: these teach counting.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    segment: torch.Tensor
    looks: torch.Tensor
    tallied: torch.Tensor

    @property
    def prefix(self) -> int:
        """Tokens before the questions: <s> and all visual tokens, dropped ones too."""
        return 1 + self.looks.shape[-1]

    def attention_mask(self, visible: int | None = None) -> torch.Tensor:
        """Who may see whom, bool `[B, 1, 1 + K + T, 1 + K + T]`, where K visual tokens are there, all by default."""
        batch, length = self.ids.shape
        before = self.prefix if visible is None else 1 + visible
        segment = torch.cat([self.segment.new_full((batch, before), -2), self.segment], 1)
        same = segment[:, :, None] == segment[:, None, :]
        picture = (segment == -2)[:, None, :]
        causal = torch.ones(before + length, before + length, dtype=torch.bool, device=self.ids.device).tril()
        return ((same | picture) & causal)[:, None]


def pack(questions: Sequence[Sequence[Question]], ids: dict[str, int], visual: int = TOKENS) -> Packed:
    """Pack the questions of each scene.

    Args:
        questions: Per scene, its questions.
        ids: Token ids by word.
        visual: Visual tokens of a picture.
    """
    rows = [[(q, [ids[w] for w in f"{q.text} {q.answer} </s>".split()]) for q in scene] for scene in questions]
    batch, length = len(rows), max(sum(len(tokens) for _, tokens in row) for row in rows)
    packed, labels, positions = (np.full((batch, length), fill) for fill in (0, IGNORE, 0))
    segment, looks = np.full((batch, length), -1), np.zeros((batch, length, visual), dtype=bool)
    tallied = np.zeros((batch, length), dtype=bool)
    for b, row in enumerate(rows):
        start = 0
        for s, (question, tokens) in enumerate(row):
            end, asked = start + len(tokens), len(question.text.split())
            packed[b, start:end], segment[b, start:end] = tokens, s
            positions[b, start:end] = 1 + visual + np.arange(len(tokens))
            labels[b, start + asked - 1 : end - 1] = tokens[asked:]
            tallied[b, start + asked - 1] = question.kind in TALLIED
            for at, where in question.looks:
                looks[b, start + at, list(where)] = True
            start = end
    return Packed(*(torch.from_numpy(array) for array in (packed, labels, positions, segment, looks, tallied)))
