"""Two kinds of questions that need several places at once, for scenes of the second testbed."""

from collections.abc import Sequence

import numpy as np

from grip_hf.pocket.questions import CHANCE, QUESTION_KINDS, Question, ask, single_items
from grip_hf.pocket.scatter import Placed
from grip_hf.pocket.vocabulary import CATEGORIES

QUESTION_KINDS2 = (*QUESTION_KINDS, "size", "owner")
CHANCE2 = {**CHANCE, "size": 1 / 2, "owner": 1 / len(CATEGORIES)}
RATIO = 1.3  # of the sides of two objects, at least, to be asked which one is larger


def ask_more(rng: np.random.Generator, items: Sequence[Placed], split: str) -> tuple[Question, ...]:
    """Draw about twelve questions of all eleven kinds; one that the scene cannot give is left out."""
    return (*ask(rng, items, split), *_sizes(rng, items), *_owners(rng, items))


def _sizes(rng: np.random.Generator, items: Sequence[Placed]) -> list[Question]:
    """Up to two pairs of objects: which one is larger."""
    single = single_items(items)
    pairs = [(a, b) for a in single for b in single if a.size >= RATIO * b.size]
    drawn = []
    for i in rng.permutation(len(pairs))[:2]:
        large, small = pairs[i]
        first, second = (large, small) if rng.random() < 0.5 else (small, large)
        text = f"which is larger the {first.name} or the {second.name}"
        words = text.split()
        looks = tuple((words.index(item.name), item.patches) for item in (first, second))
        drawn.append(Question("size", text, large.name, (*large.patches, *small.patches), looks))
    return drawn


def _owners(rng: np.random.Generator, items: Sequence[Placed]) -> list[Question]:
    """Up to two words: which object has it. All words of the scene must be read to tell."""
    worded = [item for item in items if item.word]
    drawn = []
    for i in rng.permutation(len(worded))[:2]:
        item = worded[i]
        text = f"which object has the word {' '.join(str(item.word))}"
        first = len(text.split()) - len(item.letters)
        looks = tuple((first + place, (token,)) for place, token in enumerate(item.letters))
        evidence = (*item.letters, *item.patches)
        drawn.append(Question("owner", text, item.name, evidence, looks))
    return drawn
