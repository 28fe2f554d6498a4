"""Rows that were answered at every budget, made up: some are harder than others, and doubt tells, more or less."""

import numpy as np

from grip_hf.calibration.ladder import Answered
from grip_hf.calibration.observe import Observed

TOKENS = (4, 12, 36, 144)


def draw(n, seed=0, tells=True):
    """Answers at 4, 12, 36 and all 144 tokens; one in a few hundred is wrong without a doubt."""
    rng = np.random.default_rng(seed)
    hard = rng.gamma(0.5, 1.0, n)
    unlike = np.stack([hard * (4 / tokens) * rng.lognormal(0, 0.5, n) for tokens in TOKENS[:-1]] + [np.zeros(n)])
    sure = np.exp(-unlike)
    wrong = rng.random(sure.shape) < 0.6 * (1 - sure) + 0.001
    wrong[-1] = False
    if not tells:
        sure[:-1] = rng.random((3, n))
    return sure, wrong, np.repeat(np.array(TOKENS)[:, None], n, 1)


def answered(n, seed=0, tells=True):
    sure, wrong, tokens = draw(n, seed, tells)
    return Answered(sure, wrong.astype(float), tokens == 144, tokens, np.array(TOKENS, dtype=float))


def observed(n, seed=0, tells=True):
    """The same as a model would give it: the answer 5 5 2, a wrong one 5 7 2."""
    sure, wrong, tokens = draw(n, seed, tells)
    answers = np.full((*wrong.shape, 3), 5)
    answers[..., 1] = np.where(wrong, 7, 5)
    answers[..., 2] = 2
    scores = np.full(wrong.shape, np.nan)
    budgets = (*TOKENS[:-1], 1.0)
    seconds = np.array(TOKENS) / 1000
    return Observed(budgets, answers, sure, sure**0.5, tokens, np.full(n, 144), scores, seconds, False)
