"""From what was seen to `quality.json`: promises, refusals, and what is written."""

import json
import math

import numpy as np
import pytest
from answered import observed

from grip_hf.calibration.calibrate import answered as answered_of
from grip_hf.calibration.calibrate import best_fixed, calibrate, check_rows, losses_of, same_answer, same_tokens
from grip_hf.calibration.ladder import Policy, outcome
from grip_hf.calibration.observe import Observed, rising
from grip_hf.errors import ConfigError, DatasetError
from grip_hf.quality.promise import QUALITY_FILE, Calibration

FACTS = {"model": None, "selector": "grip"}


def test_promises_are_those_of_their_ladders():
    seen = observed(1500)
    found = calibrate(seen, FACTS, [0.99, 0.95], seed=3)
    assert [(one.quality, one.rule) for one in found.promises] == [
        (0.95, "answer"), (0.99, "answer"), (0.95, "first"), (0.99, "first"),
    ]  # fmt: skip
    for one in found.promises:
        assert one.rows == 1000 and one.p_value <= 0.05 and one.confidence == 0.95
        rows = answered_of(seen, one.rule, same_answer)
        order = np.random.default_rng(3).permutation(1500)[500:]
        rungs = tuple(seen.budgets.index(rung) for rung in one.ladder)
        made = outcome(Policy(rungs, one.thresholds), rows.rows(order))
        assert one.agreement == pytest.approx(1 - made.losses.mean())
        assert (one.tokens, one.again) == pytest.approx((made.tokens.mean(), (made.looks > 1).mean()))
    weak, strong = found.promises[:2]
    assert weak.tokens < strong.tokens < 144
    assert (found.longest, found.max_new_tokens, found.data["rows"]) == (3, 3, 1500)


def test_the_curve_and_the_default_budget():
    seen = observed(1500)
    found = calibrate(seen, FACTS, [0.9])
    agreement = 1 - losses_of(seen, same_answer).mean(1)
    assert [row["agreement"] for row in found.curve] == pytest.approx(list(agreement))
    assert all(row["at_least"] <= row["agreement"] for row in found.curve) and found.curve[0]["accuracy"] is None
    smallest = next(one for one, share in zip(seen.budgets, agreement, strict=True) if share >= 0.9)
    assert found.default_budget == smallest
    rows = answered_of(seen, "answer", same_answer)
    assert seen.budgets[best_fixed(rows, 0.9, 0.95)] >= smallest


def test_units():
    assert same_answer([5, 2], [5, 2]) == 1 and same_answer([5, 2], [5, 3, 2]) == 0
    assert same_tokens([5, 6, 2], [5, 7, 2]) == pytest.approx(2 / 3) and same_tokens([5], [5, 7]) == 0.5
    seen = observed(1500)
    token = calibrate(seen, FACTS, [0.97], unit="token", rules=["answer"])
    whole = calibrate(seen, FACTS, [0.97], rules=["answer"])
    assert token.promises[0].agreement > 0.97 and token.unit == "token"
    assert token.promises[0].tokens < 144 and whole.promises[0].tokens < 144

    def first_two(full, said):
        return float(full[:2] == said[:2])

    assert calibrate(seen, FACTS, [0.97], unit=first_two).unit == "first_two"
    with pytest.raises(ConfigError, match="number in"):
        calibrate(seen, FACTS, [0.97], unit=lambda full, said: 2.0)
    with pytest.raises(ConfigError, match="unit must be one of"):
        calibrate(seen, FACTS, [0.97], unit="word")


def test_too_few_rows_are_refused_and_told_how_many():
    with pytest.raises(DatasetError, match=r"at least \d+ are needed") as caught:
        calibrate(observed(300), FACTS, [0.99])
    least = int(str(caught.value).split("at least ")[1].split()[0])
    check_rows(least, 0.99, 0.95)
    with pytest.raises(DatasetError):
        check_rows(least - 1, 0.99, 0.95)
    assert 0.99 ** (least - round(least / 3)) <= 0.05


@pytest.mark.parametrize(
    "change, said",
    [
        ({"qualities": [1.0]}, r"quality must be a number in \(0, 1\)"),
        ({"qualities": [0]}, r"quality must be a number in \(0, 1\)"),
        ({"qualities": [math.nan]}, r"quality must be a number in \(0, 1\)"),
        ({"qualities": []}, "at least one quality"),
        ({"confidence": 1.0}, r"confidence must be a number in \(0, 1\)"),
        ({"rules": ["last"]}, "rules of"),
    ],
)
def test_bad_arguments(change, said):
    with pytest.raises(ConfigError, match=said):
        calibrate(**{"seen": observed(900), "made_for": FACTS, "qualities": [0.9], **change})


def test_nan_probabilities():
    seen = observed(900)
    seen.confidences[1, 3] = math.nan
    with pytest.raises(ConfigError, match="NaN"):
        calibrate(seen, FACTS, [0.9])


def test_budgets_rise_and_end_with_all():
    assert rising([0.5, 0.1, 1.0]) == (0.1, 0.5, 1.0) and rising([24, 3]) == (3, 24, 1.0)
    for bad in ([], [1.0], [0.5, 24]):
        with pytest.raises(ConfigError, match="keep ratios below 1, or numbers"):
            rising(bad)


def test_files(tmp_path):
    seen = observed(900)
    seen.save(tmp_path / "seen.npz")
    again = Observed.load(tmp_path / "seen.npz")
    assert again.budgets == seen.budgets and (again.answers == seen.answers).all() and again.cut is False
    found = calibrate(seen, FACTS, [0.9])
    found.save(tmp_path)
    assert Calibration.load(tmp_path) == found
    path = tmp_path / QUALITY_FILE
    good = json.loads(path.read_text())
    for change in (
        {"format": 9},
        {"promises": [{**good["promises"][0], "ladder": [0.0, 1.0]}]},
        {"promises": [{**good["promises"][0], "thresholds": [1, 1, 1, 1]}]},
        {"promises": [{**good["promises"][0], "quality": 2}]},
        {"promises": [{**good["promises"][0], "p_value": "x"}]},
        {"curve": [{"budget": 0.5, "agreement": 1.0}]},
        {"more": 1},
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(ConfigError, match="is no calibration"):
            Calibration.load(tmp_path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="is no calibration"):
        Calibration.load(tmp_path)
