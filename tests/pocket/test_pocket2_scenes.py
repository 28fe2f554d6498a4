"""Scenes of the second testbed: anywhere and of any size, little overlap, and answers that follow from the record."""

from collections import Counter

import numpy as np
import pytest
import torch

from grip_hf.evaluation.downsampling import middle_patches
from grip_hf.pocket.batches import Lessons, to_lesson
from grip_hf.pocket.lessons2 import places_of
from grip_hf.pocket.perception import CLASSES, patch_labels
from grip_hf.pocket.scatter import IMAGE_SIZE, OVERLAP, SIDE
from grip_hf.pocket.scenes import make_scene
from grip_hf.pocket.splits import pair_is_held_out, word_is_held_out
from grip_hf.pocket.testbeds import POCKET2, get_testbed
from grip_hf.pocket.vocabulary import CATEGORIES, COLOURS, LETTERS, NUMBERS

SCENES = {split: [make_scene(seed, split, testbed="pocket2") for seed in range(120)] for split in ("train", "test")}
EVERY = SCENES["train"] + SCENES["test"]
ITEMS = [item for scene in EVERY for item in scene.items]


def common(a, b):
    """Pixels that two boxes share, counted on a canvas."""
    canvas = np.zeros((2, IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
    for layer, (left, top, right, bottom) in zip(canvas, (a, b), strict=True):
        layer[top:bottom, left:right] = True
    return int(canvas.all(0).sum()), int(min(canvas[0].sum(), canvas[1].sum()))


def test_same_seed_same_scene_other_seed_other_scene():
    again = make_scene(7, testbed="pocket2")
    assert np.array_equal(np.asarray(again.image), np.asarray(SCENES["test"][7].image))
    assert again.items == SCENES["test"][7].items and again.questions == SCENES["test"][7].questions
    assert make_scene(8, testbed="pocket2").items != again.items
    assert make_scene(7, "train", testbed="pocket2").items != again.items
    assert again.image.size == (256, 256) and make_scene(7, testbed="pocket").image.size == (192, 192)


def test_the_splits_share_neither_words_nor_pairs():
    for scene in SCENES["train"]:
        names = [item.name for item in scene.items]
        assert not any(pair_is_held_out(a, b) for a in names for b in names)
        assert not any(item.word and word_is_held_out(item.word) for item in scene.items)
    for scene in SCENES["test"]:
        names = [item.name for item in scene.items]
        assert any(pair_is_held_out(a, b) for a in names for b in names)
        assert all(word_is_held_out(item.word) for item in scene.items if item.word)


def test_numbers_of_objects_and_their_kinds():
    assert {len(scene.items) for scene in EVERY} == set(range(4, 13))
    most = [max(Counter(item.category for item in scene.items).values()) for scene in EVERY]
    assert set(most) == {1, 2, 3, 4}
    for scene in EVERY:
        counts = sorted(Counter(item.category for item in scene.items).values())
        assert counts[:-1] == [1] * (len(counts) - 1)
        for shared in ("plate", "word"):
            given = [getattr(item, shared) for item in scene.items if getattr(item, shared)]
            assert len(set(given)) == len(given) >= 2


def test_sizes_spread_and_everything_lies_in_the_picture():
    sizes = np.array([item.size for item in ITEMS])
    assert sizes.min() == 28 and sizes.max() > 80 and np.quantile(sizes, 0.9) > 2 * np.quantile(sizes, 0.1)
    for item in ITEMS:
        left, top, right, bottom = item.box
        assert right - left == bottom - top
        for box in (item.box, item.plate_box, item.word_box or item.box):
            assert 0 <= box[0] < box[2] <= IMAGE_SIZE and 0 <= box[1] < box[3] <= IMAGE_SIZE
        assert item.plate_box[0] <= left and right <= item.plate_box[2]
        assert (item.plate is None) == (item.plate_box == item.box) and (item.word is None) == (item.word_box is None)
        if item.word_box:  # just below it
            assert 0 <= item.word_box[1] - item.plate_box[3] <= 3
            middle = (item.word_box[0] + item.word_box[2]) / 2
            assert abs(middle - item.middle[0]) <= 8


def test_there_is_no_lattice():
    """Away from the borders, middles fall evenly on all places modulo a patch, and modulo a quarter of the picture."""
    middles = np.array([item.middle for item in ITEMS]).flatten()
    middles = middles[(middles >= 64) & (middles < 192)]
    for period in (16, 64):
        counts = np.histogram(middles % period, bins=8, range=(0, period))[0]
        expected = counts.sum() / 8
        assert ((counts - expected) ** 2 / expected).sum() < 24.3, period  # chi-squared, 7 degrees, p = 0.001
    assert len({item.centre for item in ITEMS}) > 0.7 * SIDE**2


def test_overlap_is_bounded_and_words_are_free():
    for scene in EVERY[::4]:
        for i, a in enumerate(scene.items):
            for b in scene.items[i + 1 :]:
                both, smaller = common(a.plate_box, b.plate_box)
                assert both <= OVERLAP * smaller
                if a.word_box and b.word_box:
                    assert common(a.word_box, b.word_box)[0] == 0
            if a.word_box:
                assert all(common(a.word_box, other.plate_box)[0] == 0 for other in scene.items)


def test_distractors_and_photos_are_behind():
    """Two objects' worth of pixels aside, the picture is not flat: hardly a scene has a plain background."""
    flat = 0
    for scene in EVERY[:60]:
        pixels = np.asarray(scene.image, dtype=float).mean(-1)
        behind = np.ones_like(pixels, dtype=bool)
        for item in scene.items:
            for left, top, right, bottom in (item.plate_box, item.word_box or item.box):
                behind[top : bottom + 1, left : right + 1] = False
        flat += np.abs(np.diff(pixels, axis=1))[behind[:, 1:] & behind[:, :-1]].mean() < 2
    assert flat <= 12


def answer_by_looking(scene, question):
    """An independent reading of each question from the record of the scene alone."""
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
            a, b = named[words[-1]].box, named[words[2]].box
            across, down = a[0] + a[2] - b[0] - b[2], a[1] + a[3] - b[1] - b[3]
            assert max(abs(across), abs(down)) >= 1.5 * min(abs(across), abs(down))
            if abs(across) > abs(down):
                return "left" if across < 0 else "right"
            return "above" if down < 0 else "below"
        case "where":
            left, top, right, bottom = named[words[-1]].box
            assert min(abs((left + right) / 2 - 128), abs((top + bottom) / 2 - 128)) >= 16
            return f"{'top' if top + bottom < 256 else 'bottom'} {'left' if left + right < 256 else 'right'}"
        case "reading":
            return " ".join(named[words[-1]].word)
        case "size":
            first, second = named[words[4]].box, named[words[7]].box
            one, other = first[2] - first[0], second[2] - second[0]
            assert max(one, other) >= 1.3 * min(one, other)
            return words[4] if one > other else words[7]
        case "owner":
            return next(item.name for item in scene.items if item.word == "".join(words[-3:]))


def test_answers_are_right_and_in_the_vocabulary():
    known, single = set(POCKET2.words), {"colour", "yesno", "relation", "where", "reading", "size"}
    for scene in EVERY:
        counts = Counter(item.name for item in scene.items)
        for question in scene.questions:
            assert question.answer == answer_by_looking(scene, question), question
            assert set(f"{question.text} {question.answer}".split()) <= known
            if question.kind in single:
                assert all(counts[word] <= 1 for word in question.text.split())


def test_every_kind_comes_up_and_answers_are_balanced():
    questions = [question for scene in EVERY for question in scene.questions]
    assert {question.kind for question in questions} == set(POCKET2.kinds) == set(POCKET2.chance)
    for kind, answers in (("presence", 2), ("yesno", 2), ("relation", 4), ("count", 4), ("where", 4)):
        said = [question.answer for question in questions if question.kind == kind]
        most = max(said.count(answer) for answer in set(said))
        assert len(set(said)) == answers and most / len(said) < 1 / answers + 0.25, kind
    first = [q.answer == q.text.split()[4] for q in questions if q.kind == "size"]
    assert 0.4 < sum(first) / len(first) < 0.6


def test_evidence_lies_on_the_objects_asked_about():
    for scene in EVERY:
        for question in scene.questions:
            named = [item for item in scene.items if item.name in f"{question.text} {question.answer}".split()]
            assert set(question.evidence) <= {token for item in named for token in item.cell}, question
            assert bool(question.evidence) == (question.answer != "no" or question.kind == "yesno")
            assert {token for _, where in question.looks for token in where} <= set(question.evidence)


@pytest.mark.parametrize("side", [16, 11, 8, 5])
def test_labels_name_what_lies_under_a_patch(side):
    patch = IMAGE_SIZE / side
    for scene in SCENES["train"][:20]:
        labels = patch_labels(scene.items, side)
        for item in scene.items:
            x, y = ((low + high) / 2 for low, high in (item.box[::2], item.box[1::2]))
            middle = int(y / patch) * side + int(x / patch)
            assert labels["centre"][middle] == 0 and labels["present"][item.category] == 1
            if side == SIDE and item.word_box:
                left, top, right, bottom = item.word_box
                for i, letter in enumerate(item.word):
                    x = left + (2 * i + 1) * (right - left) / 6
                    token = int((top + bottom) / 2 / patch) * side + int(x / patch)
                    assert labels["letter"][token] == LETTERS.index(letter) and labels["slot"][token] == i
                    assert labels["category"][token] == item.category
        here = {item.category for item in scene.items}
        assert set(labels["category"]) <= here | {len(CATEGORIES)}
        assert labels["present"][: len(CATEGORIES)].sum() == len(here)
        plates = {COLOURS.index(item.plate) for item in scene.items if item.plate}
        assert set(labels["colour"]) <= plates | {len(COLOURS)}
        assert all(labels[name].shape == (side * side,) for name in CLASSES)


def test_smaller_pictures_stand_where_down_sampling_puts_them():
    for side in (2, 3, 5, 8, 11, 14, 16):
        assert torch.equal(places_of(side, 16), middle_patches(torch.arange(side * side), side, 16))


def test_each_batch_is_seen_at_full_resolution_and_mostly_smaller_too():
    lessons = Lessons(2, seed=3, testbed=POCKET2)
    steps = list(lessons.run(0, 12))
    assert [lesson.side for lesson in steps[::2]] == [16] * 6 and any(lesson.side < 16 for lesson in steps[1::2])
    for first, second in zip(steps[::2], steps[1::2], strict=True):
        assert torch.equal(first.pixels, second.pixels) and second.dense["centre"].shape[1] == second.side**2
    late = list(lessons.run(5, 8))
    for ours, theirs in zip(late, steps[5:8], strict=True):
        assert ours.side == theirs.side and torch.equal(ours.packed.ids, theirs.packed.ids)
    assert to_lesson(SCENES["test"][:2], POCKET2).packed.looks.shape[-1] == 256


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="'pocket3' must be one of pocket, pocket2"):
        make_scene(0, testbed="pocket3")
    with pytest.raises(ValueError, match="'pocket3'"):
        get_testbed("pocket3")
