"""Every row is read once before the first step: a picture that does not decode must not end a run in its middle."""

from __future__ import annotations

import dataclasses
import json
import os
from array import array
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from tqdm.auto import tqdm

from ..errors import DatasetError
from ..files import write_whole
from .data import DatasetExamples
from .pictures import digest

STOP, SKIP = "stop", "skip"
CHUNK = 512  # questions handed out at once: a million futures would fill memory
SHOWN = 5
# Per question its number of pictures, 0 if it is bad; the numbers of all pictures; and what is wrong with which.
Found = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], dict[int, str]]


@dataclasses.dataclass(frozen=True)
class Screened:
    """What reading all questions found.

    Attributes:
        examples: The good ones.
        groups: [questions] int, for each of them the number of its group: two that share a picture, also by way of
            others, have the same.
        bad: Number of each bad row in the dataset, and what is wrong with it.
    """

    examples: DatasetExamples
    groups: np.ndarray[Any, Any]
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
        found = _read_all(examples, workers or len(os.sched_getaffinity(0)), progress)
        if cache is not None and key is not None:
            write_whole(cache, partial(_remember, key=key, found=found))
    counts, numbers, wrong = found
    bad = {int(examples.places[place][0]): one for place, one in wrong.items()}
    good = np.flatnonzero(counts)
    if bad and (on_bad_row == STOP or not len(good)):
        shown = "; ".join(bad[row] for row in list(bad)[:SHOWN])
        more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise DatasetError(
            f"{len(bad)} of {len(examples.dataset)} rows cannot be used: {shown}{more}. Mend them, or leave them out "
            f"with --on-bad-row {SKIP}"
        )
    return Screened(examples.subset(good), _groups(counts[good], numbers), bad)


def _read_all(examples: DatasetExamples, workers: int, progress: bool) -> Found:
    """Read every question; kept in arrays, since a million lists would fill memory."""
    counts, numbers, wrong = array("I"), array("Q"), dict[int, str]()
    bar = tqdm(total=len(examples), desc="checking rows", disable=None if progress else True)
    with bar, ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(examples), CHUNK):
            places = range(start, min(start + CHUNK, len(examples)))
            for place, one in zip(places, pool.map(partial(_read, examples), places), strict=True):
                bar.update()
                if isinstance(one, str):
                    wrong[place] = one
                counts.append(0 if isinstance(one, str) else len(one))
                numbers.extend([] if isinstance(one, str) else one)
    return np.array(counts), np.array(numbers), wrong


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


def _remember(path: Path, key: str, found: Found) -> None:
    counts, numbers, wrong = found
    with path.open("wb") as file:
        np.savez_compressed(file, key=key, counts=counts, numbers=numbers, wrong=json.dumps(wrong))


def _remembered(cache: Path | None, key: str | None) -> Found | None:
    if cache is None or key is None or not cache.is_file():
        return None
    try:
        with np.load(cache, allow_pickle=False) as known:
            wrong = {int(place): one for place, one in json.loads(str(known["wrong"])).items()}
            return (known["counts"], known["numbers"], wrong) if str(known["key"]) == key else None
    except (OSError, ValueError, KeyError, BadZipFile):
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
    group = screened.groups
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


def _groups(counts: np.ndarray[Any, Any], numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[questions] the groups of questions with these counts of pictures, whose numbers follow each other."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    _, picture = np.unique(numbers, return_inverse=True)
    question, size = np.repeat(np.arange(len(counts)), counts), len(counts) + picture.max(initial=-1) + 1
    edges = coo_array((np.ones(len(question), dtype=bool), (question, len(counts) + picture)), shape=(size, size))
    _, label = connected_components(edges, directed=False)
    return np.unique(label[: len(counts)], return_inverse=True)[1]
