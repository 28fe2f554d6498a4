"""What a calibration promises, of whom, on what grounds: `quality.json` beside a scorer or a selector's settings."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import check_keep_ratio, check_num_tokens, check_quality
from ..engine.budget import Budget
from ..errors import ConfigError
from ..files import write_json
from .doubt import ANSWER, FIRST, RULES
from .identity import told

QUALITY_FILE = "quality.json"
FORMAT = 1
MAY_BE_UNKNOWN = ("model", "weights")  # a model from a folder does not say whose it is, nor one that is offloaded
COMMAND = "grip-hf calibrate"


@dataclasses.dataclass(frozen=True)
class Promise:
    """A ladder of budgets that keeps a promise.

    Attributes:
        quality: The promise: the expected agreement with the model's answers with all visual tokens is at least this.
        confidence: How sure that is, over the draw of the rows that it was calibrated on.
        rule: What an answer is judged by: "answer", its whole probability; "first", that of its first token.
        ladder: Budgets, rising: keep ratios in (0, 1], or numbers of visual tokens > 1.
        thresholds: The least confidence at each budget but the last; an answer below it is given again at the next.
        rows: How many rows tested it.
        p_value: That of the hypothesis that it breaks the promise.
        agreement: What was seen on the rows that tested it, ...
        tokens: ... the mean number of visual tokens of the looks at a row, all together, ...
        again: ... and the share of rows that were looked at again.
    """

    quality: float
    confidence: float
    rule: str
    ladder: tuple[float | int, ...]
    thresholds: tuple[float, ...]
    rows: int
    p_value: float
    agreement: float
    tokens: float
    again: float

    def __post_init__(self) -> None:
        check_quality(self.quality)
        if self.rule not in RULES:
            raise ConfigError(f"rule must be one of {RULES}, got {self.rule!r}")
        if not self.ladder or len(self.thresholds) != len(self.ladder) - 1:
            raise ConfigError(f"a ladder of {len(self.ladder)} budgets has {len(self.thresholds)} thresholds")
        for rung in self.ladder:
            budget(rung)
        shares = {name: getattr(self, name) for name in ("confidence", "p_value", "agreement", "again")}
        shares |= {f"thresholds[{place}]": value for place, value in enumerate(self.thresholds)}
        for name, value in shares.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ConfigError(f"{name} must be in [0, 1], got {value!r}")


def budget(rung: float | int) -> Budget:
    """The budget of a rung; raises `ConfigError` if it is none."""
    if isinstance(rung, int) and not isinstance(rung, bool) and rung > 1:
        return Budget(num_tokens=check_num_tokens(rung))
    return Budget(everything=True) if check_keep_ratio(rung) == 1 else Budget(keep_ratio=check_keep_ratio(rung))


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What was found out about one model with one way to choose its tokens.

    Attributes:
        made_for: Facts of the model, of what chooses, and of how `generate` writes; a promise holds for these alone.
            One that is missing, as in files of earlier releases, is None.
        unit: What agreement is counted in: "answer", "token", or the name of a function.
        longest: Length in tokens of the longest answer that was seen.
        max_new_tokens: How many tokens could be written.
        cut: Whether an answer was cut off there.
        data: Where the rows came from, and how many there were.
        promises: What can be promised.
        curve: Per fixed budget what was seen on all rows, as plain data.
        versions: Of the libraries.
    """

    made_for: Mapping[str, Any]
    unit: str
    longest: int
    max_new_tokens: int
    cut: bool
    data: Mapping[str, Any]
    promises: tuple[Promise, ...]
    curve: tuple[Mapping[str, Any], ...]
    versions: Mapping[str, str]

    def promise(self, quality: float, rule: str | None = None) -> Promise:
        """The cheapest promise that is at least as strong as `quality`.

        Args:
            quality: The agreement that is wanted.
            rule: By which rule; None takes the whole answer, where that was calibrated.

        Raises:
            ConfigError: There is none; the message names those that there are.
        """
        rule = rule or (ANSWER if any(one.rule == ANSWER for one in self.promises) else FIRST)
        if rule not in RULES:
            raise ConfigError(f"rule must be one of {RULES}, got {rule!r}")
        mine = sorted((one for one in self.promises if one.rule == rule), key=lambda one: one.quality)
        found = next((one for one in mine if one.quality >= quality - 1e-12), None)
        if found is None:
            known = ", ".join(f"{one.quality:g}" for one in mine) or "none"
            raise ConfigError(
                f"quality={quality} by the rule {rule!r} was not calibrated; calibrated are: {known}. Run `{COMMAND} "
                f"--quality {quality} --rule {rule} ...` for it"
            )
        return found

    @property
    def default_budget(self) -> float | int | None:
        """The smallest budget of the curve that agrees as often as the weakest promise says; None if none does."""
        wanted = min((one.quality for one in self.promises), default=1.0)
        fitting = [row for row in self.curve if row["agreement"] >= wanted]
        return min(fitting, key=lambda row: row["tokens"])["budget"] if fitting else None

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `quality.json` in a folder, whole or not at all; raises `FileError`."""
        path = Path(folder) / QUALITY_FILE
        write_json(path, {"format": FORMAT, **dataclasses.asdict(self)})
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Calibration:
        """Read `quality.json` from a folder.

        Raises:
            ConfigError: It cannot be read, or is not what this release writes.
        """
        path = Path(folder) / QUALITY_FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data.pop("format") != FORMAT:
                raise ConfigError(f"it has another format than {FORMAT}, which this release reads")
            return cls.from_dict(data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is no calibration: {error}. Run `{COMMAND}` again") from error

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Calibration:
        """From what `dataclasses.asdict` gives; raises `ConfigError`, `KeyError` or `TypeError` if it is not that."""
        promises = tuple(
            Promise(**{**one, "ladder": tuple(one["ladder"]), "thresholds": tuple(one["thresholds"])})
            for one in data["promises"]
        )
        for row in data["curve"]:
            budget(row["budget"])
            if not all(math.isfinite(row[name]) for name in ("agreement", "tokens")):
                raise ConfigError(f"a row of the curve has no agreement or tokens: {row}")
        return cls(**{**data, "promises": promises, "curve": tuple(data["curve"])})


def check_made_for(calibration: Calibration, facts: Mapping[str, Any]) -> None:
    """Refuse a calibration of something else.

    Args:
        calibration: It.
        facts: What is at hand, as `made_for` has it.

    Raises:
        ConfigError: They differ; the message names in what.
    """
    known = calibration.made_for
    facts = json.loads(json.dumps(facts, default=repr))  # as they come out of a file
    apart = [
        f"{name} is {told(name, fact)}, not {told(name, known.get(name))}"
        for name, fact in facts.items()
        if fact != known.get(name) and not (name in MAY_BE_UNKNOWN and None in (fact, known.get(name)))
    ]
    if apart:
        raise ConfigError(
            f"this calibration was made for something else, and promises nothing here: {'; '.join(apart)}. Run "
            f"`{COMMAND}` for what you have"
        )


def find(given: Calibration | str | os.PathLike[str] | None, folder: str | None, needed: bool) -> Calibration | None:
    """The calibration that is given, or lies in a folder; None if there is none.

    Args:
        given: It, or its folder.
        folder: Where to look else.
        needed: Whether a damaged one there raises; else it is warned of.

    Raises:
        ConfigError: It is damaged.
    """
    if isinstance(given, Calibration):
        return given
    if given is not None:
        return Calibration.load(given)
    if folder is None or not os.path.isfile(os.path.join(folder, QUALITY_FILE)):
        return None
    try:
        return Calibration.load(folder)
    except ConfigError as error:
        if needed:
            raise
        warnings.warn(str(error), UserWarning, stacklevel=3)
        return None
