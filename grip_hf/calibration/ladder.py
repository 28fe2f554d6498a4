"""Ladders of budgets: what they would cost and get wrong on rows that were answered at every budget. Arrays alone.

A policy answers at its first budget, and again at its next one where the confidence is below a threshold. Policies are
drawn up on some rows and tested on others, in an order that was fixed before: from the most careful one on, until the
first that is not sure enough. Whoever passes is sure, all at once, since only one false hypothesis can be met first
(fixed-sequence testing; with an order learnt on other rows: "Efficiently Controlling Multiple Risks with Pareto
Testing", Laufer-Goldshtein et al., arXiv 2210.07913).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from .bound import p_value
from .timing import encodes

Array = np.ndarray[Any, Any]
# Shares of rows that a threshold sends on to the next budget. Doubt pays off where few rows are doubted.
SHARES = (0.0, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.065, 0.08, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8)
LONGEST_PATH = 60
PRIOR = np.array([1e-3, 1e-1])  # keeps a regression finite where nothing, or all, is wrong


@dataclasses.dataclass(frozen=True)
class Answered:
    """Rows that were answered at every budget.

    Attributes:
        confidences: [budgets, rows] in [0, 1].
        losses: [budgets, rows] in [0, 1]: how far an answer is from that with all tokens.
        whole: [budgets, rows] bool: whether the budget keeps all of the row's tokens, so that nothing is in doubt.
        tokens: [budgets, rows] visual tokens that are kept.
        seconds: [budgets] what an answer costs.
        vision: [budgets] what encoding the picture costs; None leaves it out, as where one encoding serves all looks.
        encodings: [budgets] the number of the encoding that a look uses; None if all share one.
    """

    confidences: Array
    losses: Array
    whole: Array
    tokens: Array
    seconds: Array
    vision: Array | None = None
    encodings: Array | None = None

    def rows(self, chosen: Array) -> Answered:
        """Some of the rows."""
        fields = ("confidences", "losses", "whole", "tokens")
        return dataclasses.replace(self, **{name: getattr(self, name)[:, chosen] for name in fields})

    def costs(self, rungs: Sequence[int]) -> list[float]:
        """What a look at each rung of a ladder costs."""
        vision = np.zeros(len(self.seconds)) if self.vision is None else self.vision
        new = encodes(None if self.encodings is None else self.encodings.tolist(), rungs)
        return [float(self.seconds[rung] + vision[rung] * one) for rung, one in zip(rungs, new, strict=True)]


@dataclasses.dataclass(frozen=True)
class Policy:
    """A ladder.

    Attributes:
        rungs: Numbers of the budgets, rising.
        thresholds: The least confidence at each rung but the last.
    """

    rungs: tuple[int, ...]
    thresholds: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a policy makes of rows.

    Attributes:
        losses: [rows] of the answers.
        kept: [rows] visual tokens behind the answers.
        tokens: [rows] those of all looks together.
        seconds: [rows] of all looks.
        looks: [rows] their numbers.
    """

    losses: Array
    kept: Array
    tokens: Array
    seconds: Array
    looks: Array


def outcome(policy: Policy, rows: Answered) -> Outcome:
    """What a policy makes of rows."""
    number = rows.losses.shape[1]
    open_ = np.ones(number, dtype=bool)
    losses, kept, tokens, seconds, looks = (np.zeros(number) for _ in range(5))
    for place, (rung, cost) in enumerate(zip(policy.rungs, rows.costs(policy.rungs), strict=True)):
        tokens += open_ * rows.tokens[rung]
        seconds += open_ * cost
        looks += open_
        sure = np.ones(number, dtype=bool)
        if place < len(policy.thresholds):
            sure = (rows.confidences[rung] >= policy.thresholds[place]) | rows.whole[rung]
        done = open_ & sure
        losses[done], kept[done] = rows.losses[rung][done], rows.tokens[rung][done]
        open_ &= ~sure
    return Outcome(losses, kept, tokens, seconds, looks)


def draw_up(rows: Answered, longest: int = 3) -> list[Policy]:
    """Policies worth testing, from the most careful to the cheapest, none beaten by another on these rows.

    Few answers are wrong, so that many policies have made no mistake on these rows. They are told apart by the losses
    that are to be expected at each confidence.

    Args:
        rows: What was seen; not the rows that will test them.
        longest: Most rungs of a ladder.
    """
    smooth = dataclasses.replace(rows, losses=np.stack([expected(rows, rung) for rung in range(len(rows.losses))]))
    found = []
    for length in range(1, longest + 1):
        for rungs in combinations(range(len(rows.losses)), length):
            found += _policies(smooth, rungs)
    risks, costs, policies = zip(*found, strict=True)
    front: list[int] = []
    for number in np.lexsort((risks, costs)):  # by rising cost: what is more careful than all cheaper ones stays
        if not front or risks[number] < risks[front[-1]] - 1e-12:
            front.append(int(number))
    front.reverse()
    if len(front) > LONGEST_PATH:  # neighbours hardly differ, and each test is one more chance to stop early
        front = [front[round(i)] for i in np.linspace(0, len(front) - 1, LONGEST_PATH)]
    return [policies[number] for number in front]


def expected(rows: Answered, rung: int) -> Array:
    """[rows] the loss to be expected of each answer at a rung, by its confidence alone: a logistic regression."""
    unlike = -np.log(rows.confidences[rung].clip(1e-30, 1.0))
    x = np.log(unlike + 1e-6)
    x = (x - x.mean()) / (x.std() + 1e-9)
    y = rows.losses[rung]

    def cost(weights: Array) -> tuple[float, Array]:
        z = weights[0] + weights[1] * x
        gap = expit(z) - y
        value = (np.logaddexp(0, z) - y * z).sum() + 0.5 * (weights**2 * PRIOR).sum()
        return float(value), np.array([gap.sum(), (gap * x).sum()]) + weights * PRIOR

    best = minimize(cost, np.array([-3.0, 0.0]), jac=True, method="L-BFGS-B").x
    return np.where(rows.whole[rung], 0.0, expit(best[0] + best[1] * x))


def _policies(rows: Answered, rungs: tuple[int, ...]) -> list[tuple[float, float, Policy]]:
    """(risk, cost, policy) of a ladder at all thresholds that are tried: per rung, quantiles of its confidences."""
    number = rows.losses.shape[1]
    open_ = np.ones((1, number), dtype=bool)
    first, *later = rows.costs(rungs)
    losses, costs = np.zeros((1, number)), np.full((1, number), first)
    chosen: list[tuple[float, ...]] = [()]
    for rung, cost in zip(rungs, later, strict=False):
        levels = np.unique(np.quantile(rows.confidences[rung], SHARES, method="higher"))
        sure = (rows.confidences[rung][None] >= levels[:, None]) | rows.whole[rung][None]
        done = open_[:, None] & sure[None]
        losses = (losses[:, None] + done * rows.losses[rung]).reshape(-1, number)
        left = (open_[:, None] & ~sure[None]).reshape(-1, number)
        costs = np.repeat(costs, len(levels), 0) + left * cost
        open_, chosen = left, [(*one, float(level)) for one in chosen for level in levels]
    losses = losses + open_ * rows.losses[rungs[-1]]
    return [
        (float(loss.mean()), float(cost.mean()), Policy(rungs, thresholds))
        for loss, cost, thresholds in zip(losses, costs, chosen, strict=True)
    ]


def certify(path: list[Policy], rows: Answered, limit: float, confidence: float) -> tuple[Policy, float] | None:
    """The last policy of a path that passes before the first one fails, and its p-value; None if none does.

    Args:
        path: Policies in the order of the tests, fixed without these rows.
        rows: What tests them.
        limit: The expected loss that is allowed.
        confidence: How sure to be that it is not exceeded.
    """
    passed = None
    for policy in path:
        losses = outcome(policy, rows).losses
        # With all tokens there is nothing to test: the loss is 0 by definition.
        p = 0.0 if rows.whole[policy.rungs[0]].all() else p_value(losses, limit)
        if p > 1 - confidence:
            break
        passed = policy, p
    return passed


def fixed(rows: Answered) -> list[Policy]:
    """One budget for all rows, from the largest to the smallest: an order that needs no rows to be fixed."""
    return [Policy((rung,), ()) for rung in reversed(range(len(rows.losses)))]
