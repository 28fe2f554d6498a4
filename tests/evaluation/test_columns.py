"""What stands beside accuracies: hard questions, calibration and compute, recomputed by plain loops."""

import random

import pytest
import torch
from classroom import build_vlm, rows
from first_testbed import FIRST
from typer.testing import CliRunner
from versions import TRAINING

from grip_hf.evaluation.columns import HARD, Mark, held_share, with_columns
from grip_hf.evaluation.confidence import calibration_error, confidences
from grip_hf.evaluation.downsampling import DOWNSAMPLING, ENLARGED, POOLED
from grip_hf.evaluation.metrics import MEAN, UNPRUNED, average, table
from grip_hf.evaluation.runner import evaluate
from grip_hf.evaluation.tasks import named_selectors
from grip_hf.frozen.data import DatasetExamples
from grip_hf.selectors import get_selector

pytestmark = TRAINING


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_calibration_error_equals_a_plain_loop(bins):
    rng = random.Random(bins)
    sure = [rng.random() for _ in range(60)] + [0.0, 1.0, 0.25, 0.5]
    right = [float(rng.random() < 0.5 * one + 0.2) for one in sure]
    expected = 0.0
    for number in range(bins):
        low, high = number / bins, (number + 1) / bins
        inside = [i for i, one in enumerate(sure) if low < one <= high or (number == 0 and one == 0)]
        if inside:
            accuracy = sum(right[i] for i in inside) / len(inside)
            confidence = sum(sure[i] for i in inside) / len(inside)
            expected += len(inside) / len(sure) * abs(accuracy - confidence)
    assert calibration_error(sure, right, bins) == pytest.approx(expected, abs=1e-12)


def test_calibration_of_known_cases():
    assert calibration_error([0.8] * 5, [1, 1, 1, 1, 0]) == pytest.approx(0)
    assert calibration_error([1.0, 1.0], [0, 0]) == 1
    with pytest.raises(ValueError, match="1 confidences and 2 scores"):
        calibration_error([0.5], [0, 1])
    with pytest.raises(ValueError, match="no calibration error"):
        calibration_error([], [])


def test_confidence_is_the_probability_of_the_text_up_to_its_end():
    torch.manual_seed(0)
    steps = [torch.randn(3, 7) for _ in range(3)]
    written = torch.tensor([[4, 5, 6], [4, 2, 0], [2, 2, 2]])  # 2 ends; 0 fills up
    expected = []
    for row, ids in enumerate(written.tolist()):
        product = 1.0
        for step, token in enumerate(ids):
            product *= float(steps[step][row].softmax(0)[token])
            if token == 2:
                break
        expected.append(product)
    assert confidences(written, steps, {2}) == pytest.approx(expected, rel=1e-5)


def marks_of(seed):
    """Answers to 40 questions of two tasks: unpruned, by a smaller picture, and by two trainings of one selector."""
    rng, found = random.Random(seed), []
    for name, trainings, budgets in (
        (UNPRUNED, 1, [1.0]),
        (DOWNSAMPLING, 1, [0.5, 0.1]),
        ("mine", 2, [0.5, 0.1]),
    ):
        for training in range(trainings):
            for budget in budgets:
                for row in range(40):
                    score = float(rng.random() < (0.9 if name == UNPRUNED else 0.6))
                    sure, share = rng.random(), budget * rng.random()
                    found.append(Mark(name, training, budget, row, "ab"[row % 2], score, "", share, sure))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_hard_questions_are_those_that_a_smaller_picture_gets_wrong(seed):
    marks = marks_of(seed)
    keys = [(UNPRUNED, 1.0), *((name, budget) for name in (DOWNSAMPLING, "mine") for budget in (0.5, 0.1))]
    plain = []
    for key in keys:
        by_training = {}
        for one in marks:
            if (one.selector, one.budget) == key:
                by_training.setdefault(one.training, {}).setdefault(one.task, []).append(one.score)
        plain += average([table({key: found}, "ab") for found in by_training.values()])
    found = with_columns(plain, marks, {"mine": [2, 3]}, 4)
    said = {(one.selector, one.training, one.budget, one.row): one.score for one in marks}
    for name in (DOWNSAMPLING, "mine"):
        for budget in (0.5, 0.1):
            asked = [
                row
                for row in range(40)
                if said[UNPRUNED, 0, 1.0, row] == 1 and said[DOWNSAMPLING, 0, budget, row] == 0
            ]
            assert asked
            (row,) = [r for r in found if (r["selector"], r["budget"], r["task"]) == (name, budget, HARD)]
            trainings = range(2 if name == "mine" else 1)
            expected = [sum(said[name, t, budget, q] for q in asked) / len(asked) for t in trainings]
            assert row["n"] == len(asked) and row["accuracy"] == pytest.approx(sum(expected) / len(expected))
            assert row.get("seeds", [0.0]) == pytest.approx(expected)
            (mean,) = [r for r in found if (r["selector"], r["budget"], r["task"]) == (name, budget, MEAN)]
            first = [one.compute for one in marks if (one.selector, one.training, one.budget) == (name, 0, budget)]
            assert mean["compute"] == pytest.approx(sum(first) / len(first))
            assert (mean.get("drops"), mean.get("layers")) == (([2, 3], 4) if name == "mine" else (None, None))
            errors = [
                calibration_error([one.confidence for one in own], [one.score for one in own])
                for t in trainings
                if (own := [one for one in marks if (one.selector, one.training, one.budget) == (name, t, budget)])
            ]
            assert mean["ece"] == pytest.approx(sum(errors) / len(errors))
    assert not [row for row in found if row["task"] == HARD and row["selector"] == UNPRUNED]
    accuracies = [(row["selector"], row["budget"], row["task"], row["accuracy"]) for row in plain]
    assert accuracies == [(r["selector"], r["budget"], r["task"], r["accuracy"]) for r in found if r["task"] != HARD]


def test_no_smaller_picture_no_hard_questions():
    marks = [one for one in marks_of(0) if one.selector != DOWNSAMPLING]
    plain = table({("mine", 0.5): {"a": [1.0]}}, ["a"])
    assert [row["task"] for row in with_columns(plain, marks, {}, 4)] == ["a", MEAN]


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "sparsevlm", "grid", DOWNSAMPLING, POOLED, ENLARGED])
def test_compute_counts_what_each_layer_sees(name):
    """6 layers, 9 text and 100 visual tokens, 11 kept; by hand."""
    method = named_selectors([name], pocket=False)[name]
    if name in ("fastv", "pyramiddrop", "sparsevlm", "grid"):
        from grip_hf.evaluation.methods import Pruned

        method = Pruned(method)
    thirds = [100 * (11 / 100) ** (step / 3) for step in (1, 2)]
    layers = {
        "fastv": [100, 100, 11, 11, 11, 11],
        "sparsevlm": [100, 100, 100 * (11 / 100) ** 0.5, 11, 11, 11],  # layers 1 and 2 rank: 15 of 32 is 2 of 6
        "pyramiddrop": [100, 100, thirds[0], thirds[1], 11, 11],
        "grid": [11] * 6,
        DOWNSAMPLING: [9] * 6,
        POOLED: [9] * 6,
        ENLARGED: [100] * 6,
    }[name]
    expected = sum(9 + round(count) for count in layers) / (6 * 109)
    assert held_share(method, 9, 100, 0.11, 6) == pytest.approx(expected)


def test_a_method_that_cannot_tell_has_no_compute():
    assert held_share(object(), 9, 100, 0.11, 6) is None


def test_an_evaluation_tells_all_of_it():
    """Through the runner: the compute of FastV in 2 layers, and a confidence for every answer."""
    data = rows(6)
    for row in data:
        row["answer"] = "apple"
    chosen = {"early": get_selector("fastv", layers=1), "grid": get_selector("grid")}
    found = evaluate(*build_vlm(), DatasetExamples(data), chosen, [0.5], progress=False, calibration=True)
    mean = {row["selector"]: row for row in found.rows if row["task"] == MEAN}
    assert (mean["early"]["drops"], mean["early"]["layers"]) == ([1], 2) and "drops" not in mean["grid"]
    assert mean[UNPRUNED]["compute"] == 1
    texts = [next(one for one in found.samples())]  # records are plain data with both figures
    assert {"compute", "confidence"} <= set(texts[0])
    shares = {name: [one.compute for one in found.marks if one.selector == name] for name in chosen}
    for early, grid in zip(shares["early"], shares["grid"], strict=True):
        assert early == pytest.approx((1 + grid) / 2) and grid < 1
    for name, row in mean.items():
        own = [one for one in found.marks if one.selector == name]
        assert all(0 < one.confidence <= 1 for one in own)
        assert row["ece"] == pytest.approx(calibration_error([m.confidence for m in own], [m.score for m in own]))
    plain = evaluate(*build_vlm(), DatasetExamples(data), chosen, [0.5], progress=False)
    assert [one.said for one in plain.marks] == [one.said for one in found.marks]
    assert all(one.confidence is None for one in plain.marks) and not any("ece" in row for row in plain.rows)


def test_the_command_prints_hard_questions_compute_and_calibration(tmp_path):
    from grip_hf.cli.app import app

    words = ["--pocket", *FIRST, "--examples", "9", "--budgets", "0.03", "--selectors", "fastv,grid,downsampling"]
    result = CliRunner().invoke(app, ["eval", *words, "--calibration", "--json", str(tmp_path / "found.json")])
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "expected calibration error" in said and "token-layers" in said and HARD in said
    assert "fastv (drops at 2 of 4 layers)" in said
