"""Questions about a layout, each with its answer and the visual tokens that hold it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from grip_hf.pocket.places import Thing
from grip_hf.pocket.splits import pair_is_held_out
from grip_hf.pocket.vocabulary import CATEGORIES, COLOURS, COLUMNS, LETTERS, NUMBERS, ROWS

QUESTION_KINDS = ("presence", "colour", "object", "yesno", "choice", "count", "relation", "where", "reading")
CHANCE = {  # accuracy of the best answer that does not look at the picture
    "presence": 1 / 2,
    "colour": 1 / len(COLOURS),
    "object": 1 / len(CATEGORIES),
    "yesno": 1 / 2,
    "choice": 1 / 4,
    "count": 1 / len(NUMBERS),
    "relation": 1 / 4,
    "where": 1 / (len(ROWS) * len(COLUMNS)),
    "reading": 1 / (21 * 5 * 21),
}


T = TypeVar("T")
T_Thing = TypeVar("T_Thing", bound=Thing)


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        kind: One of `QUESTION_KINDS`.
        text: The question, words separated by single spaces, the queried word last.
        answer: The answer in the same form.
        evidence: Visual tokens that suffice for the answer, fewest first to keep (the oracle).
        looks: For training: where the word at a position of "text answer" should look, as (position, visual tokens).
    """

    kind: str
    text: str
    answer: str
    evidence: tuple[int, ...]
    looks: tuple[tuple[int, tuple[int, ...]], ...] = field(default=(), repr=False)


def ask(rng: np.random.Generator, items: Sequence[Thing], split: str) -> tuple[Question, ...]:
    """Draw about ten questions for a layout; a kind that the layout cannot give is left out."""
    counts = Counter(item.category for item in items)
    single = single_items(items)
    absent = [name for i, name in enumerate(CATEGORIES) if i not in counts]
    drawn = [
        *_presence(rng, items, absent),
        _colour(rng, single),
        _object(rng, items),
        _yesno(rng, single),
        _choice(rng, items, absent),
        _count(rng, items, counts),
        *_relations(rng, single, split),
        _where(rng, single),
        *_reading(rng, single),
    ]
    return tuple(question for question in drawn if question is not None)


def single_items(items: Sequence[T_Thing]) -> list[T_Thing]:
    """The objects whose kind stands once in the scene."""
    counts = Counter(item.category for item in items)
    return [item for item in items if counts[item.category] == 1]


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def _question(kind: str, text: str, answer: str, evidence: Sequence[int], *looks: Sequence[Thing]) -> Question:
    """Build a question whose object words look at the given items."""
    words = text.split()
    named = {item.name: item for group in looks for item in group}
    pairs = tuple((i, tuple(named[word].patches)) for i, word in enumerate(words) if word in named)
    return Question(kind, text, answer, tuple(evidence), pairs)


def _presence(rng: np.random.Generator, items: Sequence[Thing], absent: Sequence[str]) -> list[Question]:
    item, missing = _pick(rng, items), _pick(rng, absent)
    yes = _about("presence", f"is there any {item.name}", "yes", items, item.name)
    no = Question("presence", f"is there any {missing}", "no", ())
    return [yes, no]


def _about(kind: str, text: str, answer: str, items: Sequence[Thing], name: str) -> Question:
    """A question whose last word names one or several items; it looks at the middles of all of them."""
    centres = tuple(item.centre for item in items if item.name == name)
    return Question(kind, text, answer, centres, ((len(text.split()) - 1, centres),))


def _colour(rng: np.random.Generator, single: Sequence[Thing]) -> Question | None:
    plated = [item for item in single if item.plate]
    if not plated:
        return None
    item = _pick(rng, plated)
    return _question("colour", f"which colour is behind the {item.name}", str(item.plate), item.patches, [item])


def _object(rng: np.random.Generator, items: Sequence[Thing]) -> Question:
    item = _pick(rng, [item for item in items if item.plate])
    text = f"which object is on {item.plate}"
    return Question("object", text, item.name, item.patches, ((len(text.split()) - 1, item.patches),))


def _yesno(rng: np.random.Generator, single: Sequence[Thing]) -> Question | None:
    plated = [item for item in single if item.plate]
    if not plated:
        return None
    item = _pick(rng, plated)
    truth = rng.random() < 0.5
    others = [colour for colour in COLOURS if colour != item.plate]
    colour = item.plate if truth else _pick(rng, others)
    return _question("yesno", f"is {colour} behind the {item.name}", "yes" if truth else "no", item.patches, [item])


def _choice(rng: np.random.Generator, items: Sequence[Thing], absent: Sequence[str]) -> Question:
    item = _pick(rng, items)
    options = [item.name, *(str(name) for name in rng.choice(absent, size=3, replace=False))]
    options = [options[i] for i in rng.permutation(4)]
    text = f"which one of these do you see {' '.join(options)}"
    centres = tuple(other.centre for other in items if other.name == item.name)
    return Question("choice", text, item.name, centres, ((text.split().index(item.name), centres),))


def _count(rng: np.random.Generator, items: Sequence[Thing], counts: Counter) -> Question:
    """Asks for the repeated category where there is one, else for any: all four numbers come about equally often."""
    most = max(counts.values())
    name = CATEGORIES[int(_pick(rng, [category for category, count in counts.items() if count == most]))]
    return _about("count", f"how many times do you see {name}", NUMBERS[most - 1], items, name)


def _relations(rng: np.random.Generator, single: Sequence[Thing], split: str) -> list[Question]:
    """Up to two pairs that stand clearly to each other; on the test split pairs never seen together come first."""
    pairs = [(a, b) for a in single for b in single if a is not b and a.seen_from(b)]
    pairs = [pairs[i] for i in rng.permutation(len(pairs))]
    if split == "test":
        pairs.sort(key=lambda pair: not pair_is_held_out(pair[0].name, pair[1].name))
    return [_relation(a, b) for a, b in pairs[:2]]


def _relation(a: Thing, b: Thing) -> Question:
    """Where a stands, seen from b."""
    evidence = (a.centre, b.centre, *a.patches, *b.patches)
    text = f"from the {b.name} where is the {a.name}"
    return _question("relation", text, str(a.seen_from(b)), evidence, [a, b])


def _where(rng: np.random.Generator, single: Sequence[Thing]) -> Question | None:
    single = [item for item in single if item.corner]
    if not single:
        return None
    item = _pick(rng, single)
    text = f"in which corner is the {item.name}"
    last = len(text.split()) - 1
    looks = ((last, item.patches), (last + 1, item.patches))
    return Question("where", text, str(item.corner), item.patches, looks)


def _reading(rng: np.random.Generator, single: Sequence[Thing]) -> list[Question]:
    """Up to two printed words, asked for by the object above them, answered letter by letter."""
    worded = [item for item in single if item.word]
    return [_read(worded[i]) for i in rng.permutation(len(worded))[:2]]


def _read(item: Thing) -> Question:
    text = f"which word is written under the {item.name}"
    last = len(text.split()) - 1
    assert item.word is not None and set(item.word) <= set(LETTERS)
    looks = tuple((last + i, (token,)) for i, token in enumerate(item.letters))
    return Question("reading", text, " ".join(item.word), item.letters, looks)
