"""Every row is read once before the first step: a picture that does not decode must not end a run in its middle."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..errors import DatasetError
from ..files import write_json
from .data import DatasetExamples
from .pictures import digest

STOP, SKIP = "stop", "skip"
CHUNK = 512  # questions handed out at once: a million futures would fill memory
SHOWN = 5
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Screened:
    """What reading all questions found.

    Attributes:
        examples: The good ones.
        pictures: For each of them the numbers of its pictures; equal pictures have equal numbers.
        bad: Number of each bad row in the dataset, and what is wrong with it.
    """

    examples: DatasetExamples
    pictures: list[tuple[int, ...]]
    bad: dict[int, str]


def screen(
    examples: DatasetExamples,
    on_bad_row: str = STOP,
    cache: Path | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Screened:
    """Read all questions in parallel, their pictures to the end.

    Args:
        examples: The questions.
        on_bad_row: "stop" raises if a row is bad, "skip" leaves it out.
        cache: A file that remembers the result, so that the same dataset is read once; None remembers nothing.
        workers: Threads; None takes one for each CPU of this process. Decoding leaves Python's lock.
        progress: Whether to show a bar.

    Raises:
        DatasetError: A row is bad and `on_bad_row` is "stop", or no row is good.
    """
    if on_bad_row not in (STOP, SKIP):
        raise DatasetError(f"on_bad_row must be {STOP!r} or {SKIP!r}, got {on_bad_row!r}")
    key = _key(examples)
    found = _remembered(cache, key)
    if found is None:
        workers = workers or len(os.sched_getaffinity(0))
        found = list(_read_all(examples, workers, progress))
        if cache is not None and key is not None:
            write_json(cache, {"dataset": key, "found": found}, indent=0)
    bad = {int(examples.places[place][0]): one for place, one in enumerate(found) if isinstance(one, str)}
    good = [place for place, one in enumerate(found) if not isinstance(one, str)]
    if bad and (on_bad_row == STOP or not good):
        shown = "; ".join(bad[row] for row in list(bad)[:SHOWN])
        more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise DatasetError(
            f"{len(bad)} of {len(examples.dataset)} rows cannot be used: {shown}{more}. Mend them, or leave them out "
            f"with --on-bad-row {SKIP}"
        )
    return Screened(examples.subset(good), [tuple(found[place]) for place in good], bad)


def _read_all(examples: DatasetExamples, workers: int, progress: bool) -> Iterator[Any]:
    """For each question the numbers of its pictures, or what is wrong with it."""
    bar = tqdm(total=len(examples), desc="checking rows", disable=None if progress else True)
    with bar, ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(examples), CHUNK):
            places = range(start, min(start + CHUNK, len(examples)))
            for one in pool.map(lambda place: _read(examples, place), places):
                bar.update()
                yield one


def _read(examples: DatasetExamples, place: int) -> list[int] | str:
    try:
        examples[place]
        asked, _ = examples.question(place)
        inside = [part for message in asked.messages for part in message["content"] if "image" in part]
        sources = [*asked.pictures, *(part["image"] for part in inside)]
        return [digest(one, examples.format.root) for one in sources]
    except DatasetError as error:
        return str(error)


def _key(examples: DatasetExamples) -> str | None:
    """What tells this dataset from any other; None if nothing does."""
    mark = getattr(examples.dataset, "_fingerprint", None)
    places = hash(examples.places.tobytes()) if mark is None else digest(examples.places.tobytes())
    return None if mark is None else f"{mark}/{places}/{examples.format}"


def _remembered(cache: Path | None, key: str | None) -> list[Any] | None:
    if cache is None or key is None or not cache.is_file():
        return None
    try:
        known = json.loads(cache.read_text(encoding="utf-8"))
        return known["found"] if known["dataset"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def hold_out(screened: Screened, count: int, seed: int = 0) -> tuple[DatasetExamples, DatasetExamples]:
    """Split questions at random, with all questions about one picture on the same side.

    Args:
        screened: The questions.
        count: How many to hold out.
        seed: Of the split.

    Returns:
        The questions to train on, and `count` held-out ones.

    Raises:
        DatasetError: There are too few.
    """
    total = len(screened.examples)
    group = _groups(screened.pictures)
    order = np.random.default_rng(seed).permutation(group.max() + 1)
    sizes = np.bincount(group)[order]
    needed = int(np.searchsorted(np.cumsum(sizes), count)) + 1
    held = np.flatnonzero(np.isin(group, order[:needed]))
    if len(held) < count or len(held) == total:
        raise DatasetError(
            f"the dataset has {total} usable questions about {len(sizes)} pictures, too few to hold out {count} about "
            "pictures of their own: give a smaller --eval-examples (0 for no table), or more rows"
        )
    held = np.random.default_rng(seed).permutation(held)[:count]
    train = np.flatnonzero(~np.isin(group, order[:needed]))
    return screened.examples.subset(train), screened.examples.subset(np.sort(held))


def _groups(pictures: list[tuple[int, ...]]) -> np.ndarray[Any, Any]:
    """[questions] the number of a group: those that share a picture, also by way of others, have the same."""
    parent: dict[int, int] = {}

    def root(one: int) -> int:
        parent.setdefault(one, one)
        while parent[one] != one:
            parent[one] = parent[parent[one]]
            one = parent[one]
        return one

    for first, *others in pictures:
        for other in others:
            parent[root(other)] = root(first)
    numbers: dict[int, int] = {}
    return np.array([numbers.setdefault(root(one[0]), len(numbers)) for one in pictures])
