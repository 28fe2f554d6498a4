"""The pocket scenes: deterministic, split cleanly, and with evidence that really holds the answer."""

import numpy as np
import pytest
from first_testbed import make_scene

from grip_hf.pocket.dense import dense_labels
from grip_hf.pocket.packing import IGNORE, PREFIX, pack
from grip_hf.pocket.places import CELL_SIZE, IMAGE_SIZE, PATCH_SIZE, PATCHES
from grip_hf.pocket.questions import CHANCE, QUESTION_KINDS
from grip_hf.pocket.splits import WORDS, pair_is_held_out, word_is_held_out
from grip_hf.pocket.vocabulary import CATEGORIES, COLOURS, NUMBERS, vocabulary

SCENES = {split: [make_scene(seed, split) for seed in range(60)] for split in ("train", "test")}
EVERY = SCENES["train"] + SCENES["test"]


def patch_box(token):
    row, column = divmod(token, PATCHES)
    return column * PATCH_SIZE, row * PATCH_SIZE, (column + 1) * PATCH_SIZE, (row + 1) * PATCH_SIZE


def overlap(a, b):
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def test_same_seed_same_scene_other_seed_other_scene():
    again = make_scene(7)
    assert np.array_equal(np.asarray(again.image), np.asarray(SCENES["test"][7].image))
    assert again.questions == SCENES["test"][7].questions
    assert not np.array_equal(np.asarray(again.image), np.asarray(make_scene(8).image))
    assert make_scene(7, "train").items != again.items


def test_the_splits_share_neither_words_nor_pairs():
    assert not set(WORDS["train"]) & set(WORDS["test"]) and min(map(len, WORDS.values())) > 300
    for scene in SCENES["train"]:
        names = [item.name for item in scene.items]
        assert not any(pair_is_held_out(a, b) for a in names for b in names)
        assert not any(item.word and word_is_held_out(item.word) for item in scene.items)
    for scene in SCENES["test"]:
        names = [item.name for item in scene.items]
        assert any(pair_is_held_out(a, b) for a in names for b in names)
        assert all(word_is_held_out(item.word) for item in scene.items if item.word)


def test_objects_lie_in_their_cells_and_under_their_tokens():
    for item in (item for scene in EVERY for item in scene.items):
        left, top, right, bottom = item.box
        cell = (
            item.column * CELL_SIZE,
            item.row * CELL_SIZE,
            (item.column + 1) * CELL_SIZE,
            (item.row + 1) * CELL_SIZE,
        )
        assert cell[0] <= left and right <= cell[2] and cell[1] <= top and bottom <= cell[3]
        assert all(overlap(item.box, patch_box(token)) >= PATCH_SIZE**2 / 4 for token in item.patches)
        assert item.centre in item.patches and set(item.patches) | set(item.letters) <= set(item.cell)


def answer_by_looking(scene, question):
    """An independent reading of each question from the objects alone."""
    words = question.text.split()
    named = {item.name: item for item in scene.items}
    count = sum(item.name == words[-1] for item in scene.items)
    match question.kind:
        case "presence":
            return "yes" if count else "no"
        case "colour":
            return named[words[-1]].plate
        case "object":
            return next(item.name for item in scene.items if item.plate == words[-1])
        case "yesno":
            return "yes" if named[words[-1]].plate == words[1] else "no"
        case "choice":
            return next(word for word in words[-4:] if word in named)
        case "count":
            return NUMBERS[count - 1]
        case "relation":
            subject, seen_from = named[words[-1]], named[words[2]]
            if subject.row != seen_from.row:
                return "above" if subject.row < seen_from.row else "below"
            return "left" if subject.column < seen_from.column else "right"
        case "where":
            x, y = named[words[-1]].box[0], named[words[-1]].box[1]
            half = IMAGE_SIZE // 2
            return f"{'top' if y < half else 'bottom'} {'left' if x < half else 'right'}"
        case "reading":
            return " ".join(named[words[-1]].word)


def test_answers_are_right_and_in_the_vocabulary():
    known = set(vocabulary())
    for scene in EVERY:
        for question in scene.questions:
            assert question.answer == answer_by_looking(scene, question), question
            assert set(f"{question.text} {question.answer}".split()) <= known


def test_evidence_lies_on_the_objects_asked_about():
    for scene in EVERY:
        for question in scene.questions:
            named = [item for item in scene.items if item.name in f"{question.text} {question.answer}".split()]
            allowed = {token for item in named for token in item.cell}
            assert set(question.evidence) <= allowed, question
            assert bool(question.evidence) == (question.answer != "no" or question.kind == "yesno")


def test_every_kind_comes_up_and_answers_are_balanced():
    questions = [question for scene in EVERY for question in scene.questions]
    assert {question.kind for question in questions} == set(QUESTION_KINDS) == set(CHANCE)
    for kind, answers in (("presence", 2), ("yesno", 2), ("relation", 4), ("count", 4), ("where", 4)):
        said = [question.answer for question in questions if question.kind == kind]
        most = max(said.count(answer) for answer in set(said))
        assert len(set(said)) == answers and most / len(said) < 1 / answers + 0.25, kind


def test_dense_labels_name_what_lies_there():
    scene = SCENES["train"][0]
    labels = dense_labels(scene.items)
    for item in scene.items:
        assert set(labels["category"][list(item.patches + item.letters)]) == {item.category}
        assert labels["centre"][item.centre] == 1
        if item.plate:
            assert labels["colour"][item.centre] == COLOURS.index(item.plate)
    assert labels["centre"].sum() == len(scene.items)
    empty = set(range(PATCHES**2)) - {token for item in scene.items for token in item.cell}
    assert set(labels["category"][list(empty)]) == {len(CATEGORIES)}


def test_packed_questions_see_the_picture_and_themselves_only():
    ids = {token: i for i, token in enumerate(vocabulary())}
    scenes = SCENES["test"][:3]
    packed = pack([scene.questions for scene in scenes], ids)
    mask = packed.attention_mask()[:, 0]
    for b, scene in enumerate(scenes):
        start = 0
        for question in scene.questions:
            tokens = [ids[word] for word in f"{question.text} {question.answer} </s>".split()]
            asked = len(question.text.split())
            span = slice(start, start + len(tokens))
            assert packed.ids[b, span].tolist() == tokens
            assert packed.labels[b, span].tolist() == [IGNORE] * (asked - 1) + tokens[asked:] + [IGNORE]
            assert packed.positions[b, span].tolist() == list(range(PREFIX, PREFIX + len(tokens)))
            for i in range(len(tokens)):
                seen = mask[b, PREFIX + start + i].nonzero().flatten().tolist()
                assert seen == [*range(PREFIX), *range(PREFIX + start, PREFIX + start + i + 1)]
            start += len(tokens)


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [({"seed": -1}, "seed=-1"), ({"seed": 0, "split": "dev"}, "'dev'"), ({"seed": 0, "styles": ("apple",)}, "apple")],
)
def test_bad_arguments_are_named(kwargs, said):
    with pytest.raises(ValueError, match=said):
        make_scene(**kwargs)
