"""Accuracy against time: which methods lie on the frontier, and how much time one saves at equal accuracy.

Nothing is extrapolated. A method's curve goes through its measured budgets and ends in the unpruned model; between
two of them it is a straight line, and a budget that costs more without being more accurate is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from ..errors import ConfigError
from ..selectors import SELECTORS
from .budgets import kept_of
from .downsampling import DOWNSAMPLING, POOLED
from .metrics import MEAN, UNPRUNED
from .towers import PLUS

LEVELS = 501


@dataclasses.dataclass(frozen=True)
class Point:
    """One method at one budget.

    Attributes:
        selector: The method.
        budget: The keep ratio.
        tokens: Visual tokens that are left, in the model that was timed.
        accuracy: Mean over tasks, in [0, 1].
        ms: Time to first token in milliseconds; None for what is no method, such as the oracle.
    """

    selector: str
    budget: float
    tokens: int
    accuracy: float
    ms: float | None


@dataclasses.dataclass(frozen=True)
class Saving:
    """Time to first token that a method saves against the best rival, over all accuracies that both reach.

    Attributes:
        selector: The method.
        low: Lowest accuracy compared.
        high: Highest one.
        median: Median share of the rival's time that is saved, over evenly spaced accuracies; negative if slower.
        largest: The largest share.
        accuracy: Where it is the largest.
        rival: The best rival there.
    """

    selector: str
    low: float
    high: float
    median: float
    largest: float
    accuracy: float
    rival: str


def merge(files: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several files of `grip-hf eval --json` as one: the same questions, asked with different selectors.

    Raises:
        ConfigError: The files are of another kind, asked other questions, or both judge the same selector and budget.
    """
    try:
        metas = [one["meta"] for one in files]
        rows = [{(row["selector"], row["budget"], row["task"]): row for row in one["rows"]} for one in files]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"expected files of `grip-hf eval --json`: no {error}") from error
    apart = sorted(key for key in ("model", "examples", "seed") if len({meta.get(key) for meta in metas}) > 1)
    if apart:
        raise ConfigError(f"the files of `grip-hf eval` differ in {', '.join(apart)}")
    joined: dict[Any, Any] = {}
    for one in rows:
        twice = sorted({key[0] for key in one.keys() & joined.keys()} - {UNPRUNED})
        if twice:
            raise ConfigError(f"more than one file of `grip-hf eval` judges {', '.join(twice)} at the same budget")
        joined |= one
    trained = dict.fromkeys(name for meta in metas for name in meta.get("scorers", ()))
    return {"meta": {**metas[0], "scorers": list(trained)}, "rows": list(joined.values())}


def join(judged: Mapping[str, Any], timed: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Join `grip-hf eval --json` with `grip-hf bench --json`, budget by budget; the unpruned model comes first.

    The shares of the unpruned time, which bench takes within a round, are multiplied by the first file's unpruned
    time, so that files of several runs can be joined.

    Raises:
        ConfigError: The files are of another kind, time different models, lack a time that is needed, or a selector
            inside the language model dropped at other shares of its layers in one than in the other.
    """
    try:
        means = [row for row in judged["rows"] if row["task"] == MEAN]
        first = timed[0]["setting"]
        whole, total, model = timed[0]["unpruned"]["ttft_ms"], first["visual_tokens"], first["model"]
        measured = {(row["selector"], row["num_tokens"]): row for one in timed for row in one["rows"]}
        same = ("model", "batch", "device", "dtype", "attention")
        apart = sorted(key for key in same if len({one["setting"][key] for one in timed}) > 1)
    except (KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"expected files of `grip-hf eval --json` and `grip-hf bench --json`: no {error}") from error
    if apart:
        raise ConfigError(f"the files of `grip-hf bench` differ in {', '.join(apart)}")
    points: list[Point] = []
    known = scorers(judged)
    for row in means:
        name, budget = row["selector"], row["budget"]
        if name == UNPRUNED:
            points.insert(0, Point(UNPRUNED, 1.0, total, row["accuracy"], whole))
            continue
        base, plus, share = name.partition(PLUS)
        timed_as, count = ("grip" if base in known else base) + plus + share, kept_of(total, budget)
        found = measured.get((timed_as, count))
        if found is None and (timed_as.partition(PLUS)[0] in SELECTORS or timed_as in (DOWNSAMPLING, POOLED)):
            raise ConfigError(
                f"no time of {timed_as!r} at {count} tokens; get it by `grip-hf bench --model {model} --selectors "
                f"{timed_as.partition(PLUS)[0]} --budgets {budget}{f' --tower-keep-ratio {share}' if plus else ''} "
                "--json FILE`, and give that file too"
            )
        if found is not None:
            _check_depth(row, found, model)
        tokens = count if found is None else found.get("kept", count)
        points.append(
            Point(name, budget, tokens, row["accuracy"], None if found is None else found["ttft_ratio"] * whole)
        )
    if not points or points[0].selector != UNPRUNED:
        raise ConfigError(f"the file of `grip-hf eval` has no row {UNPRUNED!r} over the task {MEAN!r}")
    return points


def _check_depth(judged: Mapping[str, Any], timed: Mapping[str, Any], model: str) -> None:
    """Refuse a time taken with drops at other depths; files from before rows told depths are not checked."""
    here, there = ([round(drop / row["layers"], 6) for drop in (row.get("drops") or ())] for row in (judged, timed))
    if here and there and here != there:
        name, depth = judged["selector"], judged["layers"]
        raise ConfigError(
            f"{name!r} was judged with drops at layers {judged['drops']} of {depth}, and timed with drops at "
            f"{timed['drops']} of {timed['layers']}: time it by `grip-hf bench --model {model} --depth-of {depth} "
            f"--selectors {name} ...`, at layers of the same share"
        )


def scorers(judged: Mapping[str, Any]) -> set[str]:
    """Names of the trained scorers in a file of `grip-hf eval`: variants of one method, timed as "grip"."""
    return {"grip"} | set(judged.get("meta", {}).get("scorers", ()))


def frontier(points: Sequence[Point], axis: str) -> list[Point]:
    """The points that no other beats, by rising `axis` ("tokens" or "ms"): cheaper or as cheap, and more accurate."""
    costed = [point for point in points if point.ms is not None]
    best: list[Point] = []
    for point in sorted(costed, key=lambda one: (getattr(one, axis), -one.accuracy)):
        if not best or point.accuracy > best[-1].accuracy:
            best.append(point)
    return best


def curve(points: Sequence[Point], selector: str) -> list[tuple[float, float]]:
    """(accuracy, ms) of a method and of the unpruned model: both rising, what is beaten left out."""
    own = [point for point in points if point.selector in (selector, UNPRUNED)]
    return [(point.accuracy, point.ms) for point in frontier(own, "ms") if point.ms is not None]


def time_at(line: Sequence[tuple[float, float]], level: float) -> float | None:
    """Milliseconds to reach an accuracy of `level` on a curve; its cheapest point where that is more accurate."""
    if level > line[-1][0]:
        return None
    if level <= line[0][0]:
        return line[0][1]
    right = next(i for i, (accuracy, _) in enumerate(line) if accuracy >= level)
    (low, early), (high, late) = line[right - 1], line[right]
    return early + (late - early) * (level - low) / (high - low)


def savings(points: Sequence[Point], variants: set[str]) -> list[Saving]:
    """What each method saves against the best of its rivals, from its least accurate budget on.

    Args:
        points: All methods and the unpruned model.
        variants: Names that are variants of one method, and so no rivals of each other.
    """
    names = dict.fromkeys(point.selector for point in points if point.ms is not None and point.selector != UNPRUNED)
    lines = {name: curve(points, name) for name in names}
    found = []
    for name, line in lines.items():
        rivals = {other: one for other, one in lines.items() if other != name and not {name, other} <= variants}
        if not rivals:
            continue
        low, high = line[0][0], min(line[-1][0], max(one[-1][0] for one in rivals.values()))
        if high < low:
            continue  # every budget of it is more accurate than all rivals ever are
        # Between two knots of all curves the share is monotone, so that its extremes lie at knots.
        knots = [accuracy for one in (line, *rivals.values()) for accuracy, _ in one if low <= accuracy <= high]
        even = [low + (high - low) * step / (LEVELS - 1) for step in range(LEVELS)]
        shares = {level: _share(line, rivals, min(level, high)) for level in (*even, *knots, high)}
        largest = max(shares, key=lambda level: shares[level][0])
        middle = median(shares[level][0] for level in even)
        found.append(Saving(name, low, high, middle, shares[largest][0], largest, shares[largest][1]))
    return sorted(found, key=lambda one: -one.median)


def _share(
    line: Sequence[tuple[float, float]], rivals: Mapping[str, Sequence[tuple[float, float]]], level: float
) -> tuple[float, str]:
    """Share of the best rival's time that is saved at an accuracy, and who that is."""
    times = {name: time for name, one in rivals.items() if (time := time_at(one, level)) is not None}
    best, mine = min(times, key=lambda name: times[name]), time_at(line, level)
    assert mine is not None
    return 1 - mine / times[best], best
