"""Bounds are compared with exact tails that are added up by hand, and with simulated draws."""

import math

import numpy as np
import pytest

from grip_hf.calibration.bound import binomial, hoeffding_bentkus, p_value, rows_needed, upper_bound


def tail(errors, n, p):
    return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(errors + 1))


@pytest.mark.parametrize("errors, n, limit", [(0, 10, 0.1), (3, 50, 0.05), (7, 300, 0.01), (40, 60, 0.5)])
def test_whole_losses_take_the_exact_binomial_tail(errors, n, limit):
    losses = np.r_[np.ones(errors), np.zeros(n - errors)]
    assert p_value(losses, limit) == pytest.approx(tail(errors, n, limit))
    assert binomial(errors, n, limit) == pytest.approx(tail(errors, n, limit))


@pytest.mark.parametrize("errors, n", [(0, 30), (2, 100), (9, 40)])
def test_clopper_pearson_inverts_the_tail(errors, n):
    bound = upper_bound(errors, n, 0.95)
    assert tail(errors, n, bound) == pytest.approx(0.05, rel=1e-6)
    assert upper_bound(n, n, 0.95) == 1


@pytest.mark.parametrize("errors, n, limit", [(0, 10, 0.1), (3, 50, 0.1), (1, 400, 0.01)])
def test_the_bound_for_graded_losses_is_never_below_the_exact_tail(errors, n, limit):
    # Releases of scipy differ in the last bit.
    assert tail(errors, n, limit) * (1 - 1e-12) <= hoeffding_bentkus(errors / n, n, limit) <= 1


@pytest.mark.parametrize("quality, confidence", [(0.99, 0.95), (0.9, 0.95), (0.995, 0.9), (0.5, 0.5)])
def test_as_few_rows_as_needed(quality, confidence):
    n = rows_needed(1 - quality, confidence)
    assert tail(0, n, 1 - quality) <= 1 - confidence + 1e-12 < tail(0, n - 1, 1 - quality) + 2e-12
    assert hoeffding_bentkus(0.0, n, 1 - quality) <= 1 - confidence + 1e-9


KINDS = {
    "right or wrong": lambda rng, n, mean: (rng.random(n) < mean).astype(float),
    "halves": lambda rng, n, mean: (rng.random(n) < 2 * mean) / 2,
    "beta": lambda rng, n, mean: rng.beta(1, 1 / mean - 1, n),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [0.02, 0.1])
def test_a_risk_just_above_the_limit_is_rarely_taken_for_a_smaller_one(kind, limit):
    rng, draws = np.random.default_rng(0), 2000
    false = sum(p_value(KINDS[kind](rng, 300, limit), limit) <= 0.1 for _ in range(draws))
    assert false / draws <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / draws)
    true = sum(p_value(KINDS[kind](rng, 300, limit / 10), limit) <= 0.1 for _ in range(50))
    assert true >= 45  # and a risk far below is told from it


@pytest.mark.parametrize("losses", [[], [0.5, math.nan], [1.1], [-0.1]])
def test_bad_losses(losses):
    with pytest.raises(ValueError, match="losses must be numbers in"):
        p_value(np.array(losses), 0.1)
