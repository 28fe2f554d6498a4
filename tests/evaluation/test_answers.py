"""When an answer is right, against figures made by hand and other people's code."""

import itertools
import random

import pytest

from grip_hf.config import ConfigError
from grip_hf.evaluation.answers import METRICS, anls, check_metric, contains, normalized_match, vqa
from grip_hf.evaluation.budgets import as_setting, check_budget, kept_of, label
from grip_hf.evaluation.metrics import wilson


@pytest.mark.parametrize(
    ("said", "answers", "right"),
    [
        ("The cat.", ["cat"], 1),
        ("cat", ["A  Cat!"], 1),
        ("a cat and a dog", ["cat"], 0),
        ("dog", ["cat", "dog"], 1),
        ("", ["cat"], 0),
    ],
)
def test_normalized_match(said, answers, right):
    assert normalized_match(said, answers) == right


def test_contains_takes_whole_words():
    assert contains("It is a Cat, I think.", ["the cat"]) == 1
    assert contains("concatenate", ["cat"]) == 0 and contains("two words here", ["words here"]) == 1
    assert contains("anything", ["."]) == 0  # nothing is left of it


def leave_one_out(said, answers):
    """The sentence of the VQA paper, as loops over people."""
    scores = []
    for i in range(len(answers)):
        others = [answer for j, answer in enumerate(answers) if j != i]
        scores.append(min(1.0, sum(answer == said for answer in others) / 3))
    return sum(scores) / len(scores)


def test_vqa_accuracy_leaves_each_person_out():
    rng = random.Random(0)
    for _ in range(200):
        answers = [rng.choice(["red", "blue", "green"]) for _ in range(10)]
        for said in ("red", "blue", "pink"):
            assert vqa(said, answers) == pytest.approx(leave_one_out(said, answers))
    # Three of ten people: 0.9, as in the tables of VQA papers; four and more: 1.
    assert vqa("red", ["red"] * 3 + ["blue"] * 7) == pytest.approx(0.9)
    assert vqa("red", ["red"] * 4 + ["blue"] * 6) == 1
    assert vqa("red", ["red"]) == 1 and vqa("red", ["blue", "red"]) == 1 and vqa("red", ["blue"]) == 0


@pytest.mark.parametrize(
    ("said", "answer"),
    [("Two.", "2"), ("a dog", "dog"), ("dont know", "don't know"), ("1,000", "1000"), ("2.5", "2.5"), ("NONE", "0")],
)
def test_vqa_compares_what_people_mean(said, answer):
    assert vqa(said, [answer] * 10) == 1


def test_vqa_keeps_what_differs():
    assert vqa("2.5", ["25"] * 10) == 0


def edits(a, b):
    """Levenshtein's distance by its recurrence, one cell at a time."""
    cells = {(i, 0): i for i in range(len(a) + 1)} | {(0, j): j for j in range(len(b) + 1)}
    for i, j in itertools.product(range(1, len(a) + 1), range(1, len(b) + 1)):
        change = cells[i - 1, j - 1] + (a[i - 1] != b[j - 1])
        cells[i, j] = min(change, cells[i - 1, j] + 1, cells[i, j - 1] + 1)
    return cells[len(a), len(b)]


def test_anls_by_the_recurrence():
    rng = random.Random(1)
    seen = set()
    for _ in range(300):
        said, *answers = ("".join(rng.choice("abc ") for _ in range(rng.randint(1, 7))) for _ in range(3))
        words = [" ".join(one.lower().split()) for one in (said, *answers)]
        likeness = [1 - edits(words[0], one) / max(len(words[0]), len(one), 1) for one in words[1:]]
        wanted = max(likeness) if max(likeness) >= 0.5 else 0.0
        assert anls(said, answers) == pytest.approx(wanted)
        seen.add(wanted)
    assert 0.0 in seen and len(seen) > 8
    assert anls("Hello World", ["hello  world"]) == 1


def test_metrics_by_name():
    assert [check_metric(name) for name in ("exact", *METRICS)] == ["exact", *METRICS]
    with pytest.raises(ConfigError, match=r"metric must be one of .*'anls'.*, got 'bleu'"):
        check_metric("bleu")


def test_budgets_are_ratios_or_counts():
    assert check_budget(0.25) == 0.25 and check_budget(1) == 1.0 and check_budget(64) == 64
    assert isinstance(check_budget(1), float) and isinstance(check_budget(64), int)
    for wrong in (0, -3, 1.5, True, "64", float("nan")):
        with pytest.raises(ConfigError):
            check_budget(wrong)
    assert as_setting(64) == {"num_tokens": 64} and as_setting(0.5) == {"keep_ratio": 0.5}
    assert (kept_of(100, 64), kept_of(50, 64), kept_of(100, 0.25)) == (64, 50, 25)
    assert (label(64), label(0.25)) == ("64 tokens", "25%")


def test_the_interval_of_graded_scores_holds_that_of_whole_ones():
    low, high = wilson(6.4, 10)
    assert low == wilson(6, 10)[0] and high == wilson(7, 10)[1] and wilson(7.0, 10) == wilson(7, 10)
