"""Stage one of pocket training: every visual token learns to name what lies under it in the model's own words."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from grip_hf.pocket.places import CELL_PATCHES, CELLS, PATCHES, Item
from grip_hf.pocket.vocabulary import CATEGORIES, COLOURS, LETTERS, WORD_LENGTH

TOKENS = PATCHES * PATCHES
NAMED = {"category": CATEGORIES, "colour": COLOURS, "letter": LETTERS}  # scored against word embeddings
PLACED = {"slot": WORD_LENGTH + 1, "centre": 2, "row": CELLS, "column": CELLS}  # scored by a linear head each
LOSS_WEIGHTS = {"category": 1.0, "colour": 0.5, "letter": 1.0, "slot": 0.5, "centre": 0.5, "row": 0.2, "column": 0.2}


def dense_labels(items: Sequence[Item]) -> dict[str, np.ndarray]:
    """What each of the 144 visual tokens holds: one int64 `[144]` array per attribute, the last class meaning none."""
    labels = {name: np.full(TOKENS, len(words)) for name, words in NAMED.items()}
    labels["slot"], labels["centre"] = np.full(TOKENS, WORD_LENGTH), np.zeros(TOKENS, dtype=np.int64)
    labels["row"], labels["column"] = (part // CELL_PATCHES for part in np.divmod(np.arange(TOKENS), PATCHES))
    for item in items:
        if item.plate is not None:
            labels["colour"][list(item.cell)] = COLOURS.index(item.plate)
        labels["category"][list(item.patches + item.letters)] = item.category
        labels["centre"][item.centre] = 1
        if item.word is not None:
            labels["colour"][list(item.letters)] = len(COLOURS)
            labels["letter"][list(item.letters)] = [LETTERS.index(letter) for letter in item.word]
            labels["slot"][list(item.letters)] = range(WORD_LENGTH)
    return labels


class DenseHeads(nn.Module):
    """Reads attributes from projected visual tokens, and which categories are present from the [CLS] state.

    Args:
        word_ids: Token ids of the words of each attribute in `NAMED`.
        hidden_size: Width of the language model.
        vision_size: Width of the vision tower.
    """

    def __init__(self, word_ids: dict[str, list[int]], hidden_size: int, vision_size: int) -> None:
        super().__init__()
        self.word_ids = word_ids
        self.none = nn.ParameterDict({name: nn.Parameter(torch.zeros(1)) for name in NAMED})
        self.placed = nn.ModuleDict({name: nn.Linear(hidden_size, classes) for name, classes in PLACED.items()})
        self.present = nn.Linear(vision_size, len(CATEGORIES))

    def forward(self, tokens: torch.Tensor, words: torch.Tensor) -> dict[str, torch.Tensor]:
        """Score projected tokens `[B, 144, D]` with the embedding table `[V, D]`; logits `[B, 144, classes]` each."""
        logits = {name: head(tokens) for name, head in self.placed.items()}
        for name, ids in self.word_ids.items():
            match = tokens @ words[ids].T * tokens.shape[-1] ** -0.5
            logits[name] = torch.cat([match, self.none[name].expand(*match.shape[:-1], 1)], dim=-1)
        return logits

    def loss(
        self, tokens: torch.Tensor, cls: torch.Tensor, words: torch.Tensor, labels: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Weighted sum of the attribute losses, and each attribute's accuracy where there is something to name."""
        total = (tokens.float().pow(2).mean(-1).sqrt() - 1).pow(2).mean()
        accuracy = {}
        for name, logits in self(tokens, words).items():
            logits, target = logits.float().flatten(0, 1), labels[name].flatten()
            total = total + LOSS_WEIGHTS[name] * F.cross_entropy(logits, target)
            there = target < logits.shape[-1] - 1 if name in NAMED or name == "slot" else target >= 0
            accuracy[name] = (logits.argmax(-1) == target)[there].float().mean()
        there = torch.zeros(len(cls), len(CATEGORIES) + 1, device=cls.device)
        there = there.scatter(1, labels["category"], 1.0)[:, :-1]
        return total + F.binary_cross_entropy_with_logits(self.present(cls).float(), there), accuracy
