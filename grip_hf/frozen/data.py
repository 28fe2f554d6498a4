"""Examples to train and to evaluate on: pictures, a conversation that asks about them, and perhaps answers."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import DatasetError as DatasetError
from .formats import RowQuestion, recognise
from .pictures import Picture, open_picture


@dataclasses.dataclass(frozen=True)
class Example:
    """One thing to ask.

    Attributes:
        messages: The conversation, pictures inside: `[{"role": ..., "content": [{"type": "image", ...}, ...]}]`.
        answer: The reference answer; None takes what the unpruned model says.
        columns: Anything else that reward functions may want.
        answers: All answers that are right, where there are several; `answer` is the first.
    """

    messages: list[dict[str, Any]]
    answer: str | None = None
    columns: dict[str, Any] = dataclasses.field(default_factory=dict)
    answers: tuple[str, ...] = ()


class Examples(Protocol):
    """Rows of examples; the same row always gives the same example."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def __getitem__(self, row: int) -> Example:
        """Return one row."""
        ...


class DatasetExamples:
    """The questions of a `datasets.Dataset`, or of any sequence of dicts.

    Args:
        dataset: Rows with columns that `formats.recognise` knows.
        probe: How many questions to read at once, so that a bad dataset fails before the first step.
        root: What relative paths of pictures are relative to; None is the working directory.

    Attributes:
        format: Which column holds what.
        places: [questions, 2] int64, the row and the turn of each question.

    Raises:
        DatasetError: There are no rows, no pictures or no prompts, or a row cannot be read.
    """

    def __init__(self, dataset: Any, probe: int = 8, root: Path | None = None) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise DatasetError(f"expected a dataset with rows by number, got {type(dataset).__name__}")
        if not len(dataset):
            raise DatasetError("the dataset has no rows")
        self.dataset, self._stored = dataset, _stored(dataset)
        first = self.row(0)
        self.format = recognise(list(getattr(dataset, "column_names", None) or first), first, root)
        self.places = self._places()
        for place in range(min(probe, len(self))):
            self[place]

    def _places(self) -> np.ndarray[Any, Any]:
        """Where the questions are; only conversations are read for it, and of them the texts alone."""
        turns = np.ones(len(self.dataset), dtype=np.int64)
        if not self.format.chat:
            return _numbered(turns)
        column = self.format.question
        texts = self.dataset.select_columns(column) if hasattr(self.dataset, "select_columns") else self.dataset
        texts = _stored(texts)
        for row in range(len(turns)):
            with contextlib.suppress(DatasetError):  # named when the row is read
                turns[row] = self.format.turns(texts(row))
        return _numbered(turns)

    def subset(self, questions: Sequence[int] | np.ndarray[Any, Any]) -> DatasetExamples:
        """Some of the questions, by number."""
        chosen = object.__new__(DatasetExamples)
        chosen.__dict__.update(self.__dict__, places=self.places[np.asarray(questions, dtype=np.int64)])
        return chosen

    def __len__(self) -> int:
        """Return the number of questions."""
        return len(self.places)

    def row(self, row: int) -> Mapping[str, Any]:
        """A row of the dataset, with its pictures as they are stored."""
        try:
            return self._stored(row)
        except Exception as error:
            raise DatasetError(f"row {row} of the dataset cannot be read: {error}") from error

    def question(self, place: int) -> tuple[RowQuestion, Mapping[str, Any]]:
        """A question, and the row that it comes from."""
        row, turn = map(int, self.places[place])
        data = self.row(row)
        try:
            return self.format.question_of(data, turn), data
        except DatasetError as error:
            raise DatasetError(f"row {row}: {error}") from error

    def __getitem__(self, place: int) -> Example:
        """Return one question.

        Raises:
            DatasetError: It has no picture, or one that does not decode, no prompt, or an answer that is no text.
        """
        asked, data = self.question(place)
        try:
            messages = with_pictures(asked.messages, asked.pictures, self.format.root)
        except DatasetError as error:
            raise DatasetError(f"row {int(self.places[place][0])}: {error}") from error
        columns = {name: data[name] for name in self.format.unused if name in data}
        return Example(messages, next(iter(asked.answers), None), columns, asked.answers)


def _numbered(turns: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[questions, 2] row and turn, from the number of turns of each row."""
    rows = np.repeat(np.arange(len(turns)), turns)
    return np.stack([rows, np.arange(len(rows)) - np.repeat(turns.cumsum() - turns, turns)], 1)


def with_pictures(messages: list[dict[str, Any]], pictures: list[Picture], root: Path | None) -> list[dict[str, Any]]:
    """Messages with decoded pictures at their places, or in front of the first user message if it has no place.

    Raises:
        DatasetError: There is no picture, one does not decode, or there are more or fewer than places.
    """
    from trl.data_utils import prepare_multimodal_messages

    filled = [
        {**one, "content": [_opened(part, root) for part in one["content"]]} if one["role"] != "assistant" else one
        for one in messages
    ]
    parts = [part for one in filled for part in one["content"] if part.get("type") == "image"]
    if not parts:
        first = next(i for i, one in enumerate(filled) if one["role"] == "user")
        places = [{"type": "image"} for _ in pictures]
        filled[first] = {**filled[first], "content": [*places, *filled[first]["content"]]}
        parts = places
    if not parts:
        raise DatasetError("there is no picture")
    empty = sum("image" not in part for part in parts)
    if empty != len(pictures):
        raise DatasetError(f"there are {len(pictures)} pictures for {empty} places in the prompt")
    return prepare_multimodal_messages(filled, [open_picture(one, root) for one in pictures])


def _opened(part: dict[str, Any], root: Path | None) -> dict[str, Any]:
    return {**part, "image": open_picture(part["image"], root)} if "image" in part else part


def _stored(dataset: Any) -> Any:
    """How a row is read as it is stored: pictures of `datasets` stay bytes or paths, wherever in the row they are."""
    kind = getattr(dataset, "format", None)
    if kind is None or not hasattr(dataset, "with_format") or kind["type"] == "custom":
        return dataset.__getitem__
    from datasets import Features

    arrow, features = dataset.with_format("arrow"), Features(_undecoded(dict(dataset.features)))
    return lambda row: features.decode_example(arrow[row].to_pylist()[0])


def _undecoded(feature: Any) -> Any:
    """A feature whose pictures, wherever they are in it, stay as they are stored."""
    from datasets import Image

    if isinstance(feature, Image):
        return Image(mode=feature.mode, decode=False)
    if isinstance(feature, Mapping):
        return {name: _undecoded(one) for name, one in feature.items()}
    if hasattr(feature, "feature"):  # a list of any kind
        feature = copy.copy(feature)
        feature.feature = _undecoded(feature.feature)
    return feature
