"""From what was seen to what can be promised."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..config import check_quality
from ..errors import ConfigError, DatasetError
from ..evaluation.facts import versions
from ..quality.doubt import ANSWER, FIRST, RULES
from ..quality.promise import Calibration, Promise
from .bound import rows_needed, upper_bound
from .ladder import Answered, Policy, certify, draw_up, fixed, outcome
from .observe import Array, Observed

TOKEN = "token"
UNITS = (ANSWER, TOKEN)
SHARE = 1 / 3  # of the rows draws up the ladders; the others test them
# Agreement in [0, 1] of an answer with that of the full model, from their tokens.
Agreement = Callable[[list[int], list[int]], float]


def same_answer(full: list[int], pruned: list[int]) -> float:
    """1 if the whole answers are the same."""
    return float(full == pruned)


def same_tokens(full: list[int], pruned: list[int]) -> float:
    """The share of places that hold the same token, of the longer answer."""
    return sum(a == b for a, b in zip(full, pruned, strict=False)) / max(len(full), len(pruned), 1)


def agreement_of(unit: str | Agreement) -> tuple[str, Agreement]:
    """The name and the function of a unit; raises `ConfigError` if it is none."""
    if callable(unit):
        return getattr(unit, "__name__", type(unit).__name__), unit
    if unit not in UNITS:
        raise ConfigError(f"unit must be one of {UNITS} or a function, got {unit!r}")
    return unit, same_answer if unit == ANSWER else same_tokens


def losses_of(seen: Observed, agreement: Agreement) -> Array:
    """[budgets, rows] in [0, 1]: how far the answers are from those with all tokens.

    Raises:
        ConfigError: The function gives something else than a number in [0, 1].
    """
    answers = [[[token for token in row if token >= 0] for row in one] for one in seen.answers.tolist()]
    found = np.array(
        [[1 - agreement(full, said) for full, said in zip(answers[-1], one, strict=True)] for one in answers]
    )
    if not bool(((found >= 0) & (found <= 1)).all()):
        raise ConfigError("the agreement of two answers must be a number in [0, 1]")
    # With all of its tokens a row is answered as it is, whatever a function says of an answer and itself.
    return np.where(seen.kept == seen.totals, 0.0, found)


def answered(seen: Observed, rule: str, agreement: Agreement) -> Answered:
    """What policies are tried on."""
    sure = seen.firsts if rule == FIRST else seen.confidences
    if not bool(np.isfinite(sure).all()):
        raise ConfigError("the model's probabilities are NaN: nothing can be promised of its answers")
    whole = seen.kept == seen.totals
    seconds = np.maximum.accumulate(seen.seconds)
    return Answered(
        np.clip(sure, 0, 1), losses_of(seen, agreement), whole, seen.kept, seconds, seen.vision, seen.encodings
    )


def check_rows(rows: int, quality: float, confidence: float, share: float = SHARE) -> None:
    """Raise `DatasetError` if so few rows cannot promise so much, even if no answer is wrong."""
    needed = rows_needed(1 - quality, confidence)
    if rows - round(share * rows) < needed:
        least = next(n for n in range(needed, 4 * needed + 8) if n - round(share * n) >= needed)
        raise DatasetError(
            f"{rows} questions about different pictures are too few to promise quality={quality:g} with "
            f"confidence={confidence:g}: at least {least} are needed, and more make it cheaper"
        )


def check_asked(
    rows: int, qualities: Sequence[float], confidence: float, rules: Sequence[str], unit: str | Agreement
) -> list[float]:
    """The qualities in order, if they can be promised at all; raises what `calibrate` raises."""
    if isinstance(confidence, bool) or not 0 < confidence < 1:
        raise ConfigError(f"confidence must be a number in (0, 1), such as 0.95, got {confidence!r}")
    unknown = sorted(set(rules) - set(RULES))
    if unknown or not rules or not qualities:
        raise ConfigError(f"give at least one quality, and rules of {RULES}, got {list(qualities)} and {list(rules)}")
    agreement_of(unit)
    wanted = sorted({check_quality(one) for one in qualities})
    check_rows(rows, wanted[-1], confidence)
    return wanted


def calibrate(
    seen: Observed,
    made_for: Mapping[str, Any],
    qualities: Sequence[float],
    confidence: float = 0.95,
    rules: Sequence[str] = RULES,
    unit: str | Agreement = ANSWER,
    max_new_tokens: int | None = None,
    seed: int = 0,
    data: Mapping[str, Any] | None = None,
) -> Calibration:
    """Choose ladders and thresholds that keep promises at the least cost.

    A third of the rows, drawn at random, draws up ladders by their measured time; the others test them (see
    `ladder`). Each promise holds with the given confidence by itself.

    Args:
        seen: What was observed, on independent rows.
        made_for: What the promises hold for; see `Calibration`.
        qualities: Agreements to promise, in (0, 1).
        confidence: How sure each promise is to be, in (0, 1).
        rules: By which rules answers are doubted.
        unit: What agreement is counted in: "answer", "token", or a function of two lists of tokens.
        max_new_tokens: How many tokens could be written; None takes the longest answer.
        seed: Of the draw.
        data: Facts about the rows.

    Raises:
        ConfigError: An argument is not allowed.
        DatasetError: There are too few rows; the message says how many are needed.
    """
    wanted = check_asked(len(seen), qualities, confidence, rules, unit)
    name, agreement = agreement_of(unit)
    order = np.random.default_rng(seed).permutation(len(seen))
    first = round(SHARE * len(seen))
    promises = []
    for rule in dict.fromkeys(rules):
        rows = answered(seen, rule, agreement)
        path, tested = draw_up(rows.rows(order[:first])), rows.rows(order[first:])
        promises += [_promise(seen, path, tested, quality, confidence, rule) for quality in wanted]
    most = seen.longest if max_new_tokens is None else max_new_tokens
    facts = {**(data or {}), "rows": len(seen), "seed": seed}
    table = tuple(curve(seen, agreement, confidence))
    return Calibration(made_for, name, seen.longest, most, seen.cut, facts, tuple(promises), table, versions())


def _promise(
    seen: Observed, path: list[Policy], tested: Answered, quality: float, confidence: float, rule: str
) -> Promise:
    found = certify(path, tested, 1 - quality, confidence)
    policy, p = found if found is not None else (Policy((len(seen.budgets) - 1,), ()), 0.0)
    made = outcome(policy, tested)
    return Promise(
        quality=quality,
        confidence=confidence,
        rule=rule,
        ladder=tuple(seen.budgets[rung] for rung in policy.rungs),
        thresholds=policy.thresholds,
        rows=tested.losses.shape[1],
        p_value=p,
        agreement=float(1 - made.losses.mean()),
        tokens=float(made.tokens.mean()),
        again=float((made.looks > 1).mean()),
    )


def curve(seen: Observed, agreement: Agreement, confidence: float) -> list[dict[str, Any]]:
    """Per budget for all rows: tokens, agreement with its lower bound, accuracy where answers are known, and time."""
    losses, found = losses_of(seen, agreement), []
    for number, one in enumerate(seen.budgets):
        whole = bool(np.isin(losses[number], (0.0, 1.0)).all())
        bound = 1 - upper_bound(int(losses[number].sum()), len(seen), confidence) if whole else None
        known = seen.scores[number][~np.isnan(seen.scores[number])]
        found.append(
            {
                "budget": one,
                "tokens": float(seen.kept[number].mean()),
                "agreement": float(1 - losses[number].mean()),
                "at_least": 1.0 if one == 1 else bound,
                "accuracy": float(known.mean()) if known.size else None,
                "ms": float(1000 * seen.seconds[number]),
            }
        )
    return found


def best_fixed(rows: Answered, quality: float, confidence: float) -> int:
    """Number of the smallest budget that may be promised for all rows alike, tested on all of them."""
    found = certify(fixed(rows), rows, 1 - quality, confidence)
    return len(rows.losses) - 1 if found is None else found[0].rungs[0]
