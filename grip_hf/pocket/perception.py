"""What the tower of the second testbed is taught directly: to tell what lies under each patch, at any resolution.

Plain classifiers on the tower's own states, thrown away after training. They know nothing of the language model's
words, and the projector gets no such lesson: it learns from answers alone.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from grip_hf.pocket.places import covered, token_at
from grip_hf.pocket.scatter import IMAGE_SIZE, LARGEST, SMALLEST, Placed, touched_at
from grip_hf.pocket.vocabulary import CATEGORIES, COLOURS, LETTERS, WORD_LENGTH

SIZES = 6  # classes of size, evenly spaced by logarithm
CLASSES = {  # the last class of each means none
    "category": len(CATEGORIES) + 1,
    "colour": len(COLOURS) + 1,
    "letter": len(LETTERS) + 1,
    "slot": WORD_LENGTH + 1,
    "centre": 2,
    "size": SIZES + 1,
}
PRESENT = len(CATEGORIES) + len(COLOURS) + len(LETTERS)  # what [CLS] is to tell, as a caption would
PRESENT_WEIGHT = 2.0
NAMED = 0.6  # weight of the patches that hold something, few as they are
WEIGHTS = {"category": 1.0, "colour": 0.5, "letter": 1.0, "slot": 0.5, "centre": 0.5, "size": 0.3}


def patch_labels(items: Sequence[Placed], side: int) -> dict[str, np.ndarray]:
    """What lies under each patch of the picture cut into side x side: one int64 `[side * side]` array per attribute.

    A word's patches carry the category of the object that it belongs to as well. "present" is for the whole picture:
    which categories, colours of plates and letters are there, float32 `[PRESENT]`.
    """
    patch = IMAGE_SIZE / side
    labels = {name: np.full(side * side, classes - 1) for name, classes in CLASSES.items()}
    for item in items:  # larger ones first, as they are drawn
        middle = token_at(*item.middle, side, patch)
        body = list(dict.fromkeys([middle, *covered(item.box, side, patch)]))
        letters = [token_at(x, y, side, patch) for x, y in item.letter_middles]
        if item.plate is not None:
            labels["colour"][list(touched_at(item.plate_box, side))] = COLOURS.index(item.plate)
        labels["category"][body + letters] = item.category
        labels["size"][body] = size_class(item.size)
        labels["centre"][middle] = 0
    for item in items:  # words are drawn last
        letters = [token_at(x, y, side, patch) for x, y in item.letter_middles]
        if item.word is not None and len(set(letters)) == WORD_LENGTH:  # else the patches are larger than letters
            labels["category"][letters] = item.category
            labels["colour"][letters] = len(COLOURS)
            labels["letter"][letters] = [LETTERS.index(letter) for letter in item.word]
            labels["slot"][letters] = range(WORD_LENGTH)
    labels["present"] = np.zeros(PRESENT, dtype=np.float32)
    for item in items:
        labels["present"][item.category] = 1
        if item.plate is not None:
            labels["present"][len(CATEGORIES) + COLOURS.index(item.plate)] = 1
        letters = [LETTERS.index(letter) for letter in item.word or ""]
        labels["present"][[len(CATEGORIES) + len(COLOURS) + letter for letter in letters]] = 1
    return labels


def size_class(size: int) -> int:
    """Class of an object's size, 0 to `SIZES` - 1."""
    share = np.log(size / SMALLEST) / np.log(LARGEST / SMALLEST)
    return min(int(share * SIZES), SIZES - 1)


class PatchHeads(nn.Module):
    """One linear classifier per attribute on the tower's patch states, and one on [CLS] of what is in the picture.

    Args:
        vision_size: Width of the tower.
    """

    def __init__(self, vision_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(vision_size)
        self.heads = nn.ModuleDict({name: nn.Linear(vision_size, classes) for name, classes in CLASSES.items()})
        self.present = nn.Linear(vision_size, PRESENT)

    def loss(
        self, states: torch.Tensor, labels: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Weighted sum of the attribute losses, and each attribute's accuracy where there is something to name.

        Args:
            states: [CLS] and patch states `[B, 1 + N, V]`.
            labels: As `patch_labels` gives them, stacked.
        """
        states = self.norm(states)
        present = F.binary_cross_entropy_with_logits(self.present(states[:, 0]).float(), labels["present"])
        states, total, accuracy = states[:, 1:], PRESENT_WEIGHT * present, {"present": present}
        for name, head in self.heads.items():
            logits, target = head(states).float().flatten(0, 1), labels[name].flatten()
            losses, there = F.cross_entropy(logits, target, reduction="none"), target < CLASSES[name] - 1
            named, empty = ((losses * where).sum() / where.sum().clamp(min=1) for where in (there, ~there))
            total = total + WEIGHTS[name] * (NAMED * named + (1 - NAMED) * empty)
            accuracy[name] = ((logits.argmax(-1) == target) & there).sum() / there.sum().clamp(min=1)
        return total, accuracy
