"""What is kept out of training: whole words and whole pairs of categories, decided by a hash of their names."""

import hashlib
from functools import cache
from itertools import product

from grip_hf.pocket.vocabulary import CONSONANTS, VOWELS

HELD_OUT_WORDS = 0.2
HELD_OUT_PAIRS = 0.1


def _fraction(text: str) -> float:
    """A fixed pseudo-random number in [0, 1) for a text, the same on every machine and Python."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


def word_is_held_out(word: str) -> bool:
    """Whether a printed word belongs to the test split alone."""
    return _fraction(f"word/{word}") < HELD_OUT_WORDS


@cache
def pair_is_held_out(first: str, second: str) -> bool:
    """Whether two categories never stand in one training scene. Symmetric; a category pairs freely with itself."""
    a, b = sorted((first, second))
    return a != b and _fraction(f"pair/{a}/{b}") < HELD_OUT_PAIRS


RUDE = {"cum", "dik", "fag", "fuk", "jap", "jiz", "kok", "nig", "sex", "tit"}
ALL_WORDS = tuple(w for w in map("".join, product(CONSONANTS, VOWELS, CONSONANTS)) if w not in RUDE)
WORDS = {
    "train": tuple(word for word in ALL_WORDS if not word_is_held_out(word)),
    "test": tuple(word for word in ALL_WORDS if word_is_held_out(word)),
}
