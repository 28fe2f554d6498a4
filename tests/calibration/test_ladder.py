"""Ladders are compared with a plain loop over rows, and their promises with fresh rows."""

import dataclasses
import math

import numpy as np
import pytest
from answered import answered

from grip_hf.calibration.bound import p_value
from grip_hf.calibration.ladder import Policy, certify, draw_up, expected, fixed, outcome


def with_tower(rows):
    """The first two budgets look at one encoding of the picture, the others each at one of their own."""
    vision, encodings = np.array([5.0, 5.0, 20.0, 60.0]), np.array([0, 0, 1, 2])
    return dataclasses.replace(rows, vision=vision, encodings=encodings)


@pytest.mark.parametrize("tower", [False, True])
@pytest.mark.parametrize("policy", [Policy((2,), ()), Policy((0, 3), (0.9,)), Policy((0, 1, 3), (0.95, 0.6))])
def test_an_outcome_is_that_of_a_loop_over_rows(policy, tower):
    rows = with_tower(answered(200, seed=1)) if tower else answered(200, seed=1)
    encoding = {(): (5, 5, 20, 60), (0,): (0, 0, 20, 60), (0, 1): (0, 0, 20, 60)}  # by the looks before
    found = outcome(policy, rows)
    for row in range(200):
        tokens = seconds = 0
        for place, rung in enumerate(policy.rungs):
            tokens, seconds = tokens + rows.tokens[rung, row], seconds + rows.seconds[rung]
            seconds += encoding[policy.rungs[:place]][rung] if tower else 0
            last = place == len(policy.thresholds)
            if last or rows.whole[rung, row] or rows.confidences[rung, row] >= policy.thresholds[place]:
                break
        assert (found.losses[row], found.kept[row]) == (rows.losses[rung, row], rows.tokens[rung, row])
        assert (found.tokens[row], found.seconds[row], found.looks[row]) == (tokens, seconds, place + 1)


@pytest.mark.parametrize("tower", [False, True])
def test_a_path_runs_from_careful_to_cheap_and_ends_at_the_smallest_budget(tower):
    rows = with_tower(answered(600, seed=2)) if tower else answered(600, seed=2)
    path = draw_up(rows)
    costs = [outcome(one, rows).seconds.mean() for one in path]
    assert costs == sorted(costs, reverse=True) and len(set(path)) == len(path) <= 60
    assert path[0].rungs[-1] == 3 and outcome(path[0], rows).losses.mean() == 0
    assert path[-1] == Policy((0,), ())
    assert any(len(one.rungs) > 1 for one in path)


def test_expected_losses_fall_with_confidence_and_add_up():
    rows = answered(3000, seed=3)
    found, sure = expected(rows, 0), rows.confidences[0]
    assert found.mean() == pytest.approx(rows.losses[0].mean(), abs=2e-3)
    assert (np.diff(found[np.argsort(sure)]) <= 1e-12).all()
    assert (expected(rows, 3) == 0).all()


def test_tests_stop_at_the_first_failure():
    rows = answered(500, seed=4)
    good, bad = Policy((3,), ()), Policy((0,), ())
    assert certify([bad, good], rows, 0.01, 0.95) is None
    assert certify([good, bad, Policy((1, 3), (1.0,))], rows, 0.01, 0.95) == (good, 0.0)
    cheap = Policy((2, 3), (0.9,))
    assert certify([good, cheap], rows, 0.2, 0.95) == (cheap, p_value(outcome(cheap, rows).losses, 0.2))


@pytest.mark.parametrize("tells", [True, False], ids=["doubt tells", "doubt tells nothing"])
@pytest.mark.parametrize("limit", [0.02, 0.05])
def test_promises_hold_on_fresh_rows(tells, limit):
    """Over draws, a promise made with 90 % confidence is broken no more often than that, whatever doubt is worth."""
    draws, broken, tokens, alike = 60, 0, [], []
    truth = answered(60_000, seed=99, tells=tells)
    for seed in range(draws):
        rows = answered(900, seed=1000 + seed, tells=tells)
        found = certify(draw_up(rows.rows(np.arange(300))), rows.rows(np.arange(300, 900)), limit, 0.9)
        assert found is not None
        made = outcome(found[0], truth)
        broken += made.losses.mean() > limit
        one = certify(fixed(rows), rows, limit, 0.9)
        tokens.append(made.tokens.mean())
        alike.append(144 if one is None else outcome(one[0], truth).tokens.mean())
    assert broken / draws <= 0.1 + 2 * math.sqrt(0.09 / draws)
    assert not tells or np.mean(tokens) < 0.9 * np.mean(alike)
