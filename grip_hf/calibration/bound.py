"""How sure a risk is below a limit, from what was seen on independent rows: distribution-free, for any number of rows.

A p-value is that of the hypothesis "the expected loss is above the limit"; it is at most d with a probability of at
most d if that is so. Losses of 0 and 1 take the exact binomial tail, whose inversion is the bound of Clopper and
Pearson (1934). Losses in between take the bound of Hoeffding and Bentkus as in Bates et al., "Distribution-Free,
Risk-Controlling Prediction Sets" (arXiv 2101.02703), which is what Angelopoulos et al., "Learn then Test" (arXiv
2110.01052), use.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.special import rel_entr
from scipy.stats import beta, binom

Array = np.ndarray[Any, Any]


def p_value(losses: Array, limit: float) -> float:
    """The p-value of "the expected loss is above `limit`".

    Args:
        losses: [n] of independent rows, each in [0, 1].
        limit: In (0, 1).

    Raises:
        ValueError: There are no losses, or one is NaN or outside [0, 1].
    """
    losses = np.asarray(losses, dtype=np.float64)
    if not losses.size or not bool(((losses >= 0) & (losses <= 1)).all()):
        raise ValueError("losses must be numbers in [0, 1], at least one")
    whole = bool(np.isin(losses, (0.0, 1.0)).all())
    if whole:
        return binomial(int(losses.sum()), losses.size, limit)
    return hoeffding_bentkus(float(losses.mean()), losses.size, limit)


def binomial(errors: int, n: int, limit: float) -> float:
    """The probability of at most `errors` among `n` rows, each of which goes wrong with the probability `limit`."""
    return float(binom.cdf(errors, n, limit))


def hoeffding_bentkus(mean: float, n: int, limit: float) -> float:
    """The smaller one of the bounds of Hoeffding and of Bentkus on the p-value, for losses in [0, 1] of this mean."""
    low = min(mean, limit)
    hoeffding = math.exp(-n * float(rel_entr(low, limit) + rel_entr(1 - low, 1 - limit)))
    # A mean that should be a whole number of errors must not become one more by rounding.
    bentkus = math.e * binomial(math.ceil(n * mean - 1e-9), n, limit)
    return min(hoeffding, bentkus, 1.0)


def upper_bound(errors: int, n: int, confidence: float) -> float:
    """One-sided bound of Clopper and Pearson: the risk is at most this, with this confidence."""
    return 1.0 if errors >= n else float(beta.ppf(confidence, errors + 1, n - errors))


def rows_needed(limit: float, confidence: float) -> int:
    """The fewest rows of which none may go wrong that tell a risk below `limit` with this confidence."""
    return math.ceil(math.log(1 - confidence) / math.log(1 - limit) - 1e-9)
