"""Fixed budgets and promises side by side: agreement and accuracy against tokens and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import DatasetError
from ..evaluation.budgets import label
from ..evaluation.plot import two_panels
from ..quality.doubt import RULES
from .calibrate import SHARE, Agreement, Array, agreement_of, answered, check_rows, curve
from .ladder import Policy, certify, draw_up, outcome
from .observe import Observed
from .timing import Times, first_token

FIXED, PROMISE = "fixed", "promise"


def overview(
    seen: Observed,
    times: Times,
    qualities: Sequence[float],
    confidence: float = 0.95,
    unit: str | Agreement = "answer",
    seed: int = 0,
    rules: Sequence[str] = RULES,
) -> list[dict[str, Any]]:
    """One row per fixed budget, over all rows, and per promise, over the rows that test it, as plain data.

    A quality that so few rows cannot promise is left out.

    Args:
        seen: What was observed, on independent rows.
        times: What each budget takes.
        qualities: What to promise.
        confidence: How sure.
        unit: What agreement is counted in.
        seed: Of the draw of the rows that draw up ladders.
        rules: By which rules answers are doubted.
    """
    _, agreement = agreement_of(unit)
    rows = [
        {**row, "kind": FIXED, "name": label(row["budget"]), "rule": None, "ttft_ms": times.ttft[number]}
        for number, row in enumerate(curve(seen, agreement, confidence))
    ]
    order = np.random.default_rng(seed).permutation(len(seen))
    first, rest = np.split(order, [round(SHARE * len(seen))])
    length = float((seen.answers[-1] >= 0).sum(-1).mean())
    for rule in rules:
        all_rows = answered(seen, rule, agreement)
        path = draw_up(all_rows.rows(first))
        for quality in sorted(qualities):
            try:
                check_rows(len(seen), quality, confidence)
            except DatasetError:
                continue
            found = certify(path, all_rows.rows(rest), 1 - quality, confidence)
            policy = Policy((len(seen.budgets) - 1,), ()) if found is None else found[0]
            made = outcome(policy, all_rows.rows(rest))
            scores = _scores(seen.rows(rest), policy, made.looks)
            reached = [float((made.looks > place).mean()) for place in range(len(policy.rungs))]
            rows.append(
                {
                    "kind": PROMISE,
                    "name": f"{quality:.1%} promised",
                    "rule": rule,
                    "quality": quality,
                    "ladder": [seen.budgets[rung] for rung in policy.rungs],
                    "thresholds": list(policy.thresholds),
                    "tokens": float(made.tokens.mean()),
                    "again": float((made.looks > 1).mean()),
                    "agreement": float(1 - made.losses.mean()),
                    "accuracy": float(scores.mean()) if scores.size else None,
                    "ttft_ms": first_token(times, policy.rungs, reached, length, rule),
                }
            )
    return rows


def _scores(seen: Observed, policy: Policy, looks: Array) -> Array:
    """How right the answers that stand are, where that is known."""
    rungs = np.array(policy.rungs)[looks.astype(int) - 1]
    found = seen.scores[rungs, np.arange(len(seen))]
    return found[~np.isnan(found)]


def smallest(rows: Sequence[Mapping[str, Any]], points: float) -> tuple[Mapping[str, Any], str]:
    """The smallest fixed budget that loses at most so many points, and of what: accuracy where it is known."""
    alike = [row for row in rows if row["kind"] == FIXED]
    full = max(alike, key=lambda row: row["tokens"])
    name = "accuracy" if full["accuracy"] is not None else "agreement"
    fitting = [row for row in alike if row[name] >= full[name] - points / 100 - 1e-9]
    return min(fitting, key=lambda row: row["tokens"]), name


def draw(rows: Sequence[Mapping[str, Any]], title: str) -> Any:
    """Agreement against visual tokens and against time to first token.

    Returns:
        A matplotlib figure, to be saved by `savefig`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, (left, right) = two_panels(10, 4.4)
    styles = {"answer": {"color": "#c1121f", "marker": "o"}, "first": {"color": "#4477aa", "marker": "s"}}
    for axes, axis in ((left, "tokens"), (right, "ttft_ms")):
        alike = sorted((row for row in rows if row["kind"] == FIXED), key=lambda row: row["tokens"])
        values = [100 * row["agreement"] for row in alike]
        axes.plot([row[axis] for row in alike], values, color="#777777", marker="D", label="one budget for all")
        for rule, style in styles.items():
            mine = [row for row in rows if row["rule"] == rule]
            values = [100 * row["agreement"] for row in mine]
            if mine:
                label_ = f"promises, by the {'whole answer' if rule == 'answer' else 'first token'}"
                axes.plot([row[axis] for row in mine], values, label=label_, **style)
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_xscale("log")
    left.set_xlabel("visual tokens of all looks, mean")
    right.set_xlabel("time to first token, ms, mean")
    left.set_ylabel("answers as with all tokens, %")
    figure.suptitle(title)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure
