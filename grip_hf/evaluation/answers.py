"""When is an answer right? A score in [0, 1] from what the model wrote and from what people would accept."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from ..errors import ConfigError

Metric = Callable[[str, Sequence[str]], float]
EXACT = "exact"
AGREEMENT = "agreement with the full model"
ARTICLES = re.compile(r"\b(a|an|the)\b")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
WORDS = {"none": "0", **{word: str(number) for number, word in enumerate(NUMBERS)}}
CONSENSUS = 3  # people who must agree for a whole point (VQA)
ANLS_THRESHOLD = 0.5


def normalized(text: str) -> str:
    """Lower case, without articles, punctuation and spare blanks, as SQuAD compares answers (arXiv 1606.05250)."""
    return " ".join(ARTICLES.sub(" ", re.sub(r"[^\w\s]", " ", text.lower())).split())


def normalized_match(said: str, answers: Sequence[str]) -> float:
    """1 if the whole answer is right once both are `normalized`."""
    return float(normalized(said) in set(map(normalized, answers)))


def contains(said: str, answers: Sequence[str]) -> float:
    """1 if an answer stands in the text as whole words, once both are `normalized`."""
    text = f" {normalized(said)} "
    return float(any(f" {one} " in text for one in map(normalized, answers) if one))


def vqa_text(text: str) -> str:
    """What VQA's evaluation compares: no case, articles and punctuation, numbers as digits, contractions as one word.

    The official script mends apostrophes that are missing; leaving them out on both sides compares the same.
    """
    text = re.sub(r"(?<=\d)[,.](?=\d{3}\b)", "", text.lower().strip())
    text = re.sub(r"(?<!\d)\.|\.(?!\d)|['’`]", "", text)
    words = ARTICLES.sub(" ", re.sub(r"[^\w\s.]", " ", text)).split()
    return " ".join(WORDS.get(word, word) for word in words)


def vqa(said: str, answers: Sequence[str]) -> float:
    """VQA accuracy (arXiv 1505.00468): min(people who said so / 3, 1), averaged over leaving each person out.

    With fewer than four people three of the others cannot agree; then an answer that any of them gave is right.
    """
    given, mine = list(map(vqa_text, answers)), vqa_text(said)
    votes = given.count(mine)
    if len(given) <= CONSENSUS:
        return float(votes > 0)
    left_out = [votes - (one == mine) for one in given]
    return sum(min(1.0, count / CONSENSUS) for count in left_out) / len(given)


def anls(said: str, answers: Sequence[str]) -> float:
    """ANLS (arXiv 1905.13648): likeness to the nearest answer by Levenshtein's distance, 0 below one half.

    Raises:
        ConfigError: rapidfuzz is not installed.
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise ConfigError("the metric 'anls' needs rapidfuzz: pip install 'grip-hf[eval]'") from error

    mine = " ".join(said.lower().split())
    alike = max(Levenshtein.normalized_similarity(mine, " ".join(one.lower().split())) for one in answers)
    return float(alike) if alike >= ANLS_THRESHOLD else 0.0


METRICS: dict[str, Metric] = {"normalized": normalized_match, "contains": contains, "vqa": vqa, "anls": anls}


def check_metric(name: str) -> str:
    """Return `name` if it is that of a metric, or raise `ConfigError`."""
    if name not in (EXACT, *METRICS):
        raise ConfigError(f"metric must be one of {[EXACT, *METRICS]}, got {name!r}")
    return name
