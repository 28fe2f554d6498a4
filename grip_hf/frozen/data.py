"""Examples to train on: pictures, a conversation that asks about them, and perhaps the answer.

A dataset has the columns `image` or `images`, `prompt` (a conversation, or one question as plain text) and optionally
`answer`, as TRL's scripts for vision-language models use them. Other columns reach the reward functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from PIL import Image

from ..errors import DatasetError as DatasetError

IMAGE_COLUMNS = ("images", "image")


@dataclasses.dataclass(frozen=True)
class Example:
    """One thing to ask.

    Attributes:
        messages: The conversation, pictures inside: `[{"role": ..., "content": [{"type": "image", ...}, ...]}]`.
        answer: The reference answer; None takes what the unpruned model says.
        columns: Anything else that reward functions may want.
    """

    messages: list[dict[str, Any]]
    answer: str | None = None
    columns: dict[str, Any] = dataclasses.field(default_factory=dict)


class Examples(Protocol):
    """Rows of examples; the same row always gives the same example."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def __getitem__(self, row: int) -> Example:
        """Return one row."""
        ...


class DatasetExamples:
    """The rows of a `datasets.Dataset`, or of any sequence of dicts.

    Args:
        dataset: Rows with the columns named above.
        probe: How many rows to read at once, so that a bad dataset fails before the first step.

    Raises:
        DatasetError: There are no rows, no pictures or no prompts, or a row cannot be read.
    """

    def __init__(self, dataset: Any, probe: int = 8) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise DatasetError(f"expected a dataset with rows by number, got {type(dataset).__name__}")
        if not len(dataset):
            raise DatasetError("the dataset has no rows")
        self.dataset = dataset
        columns = getattr(dataset, "column_names", None) or list(self._row(0))
        self.image_column = next((name for name in IMAGE_COLUMNS if name in columns), "")
        for name, found in (("image' or 'images", self.image_column), ("prompt", "prompt" in columns)):
            if not found:
                raise DatasetError(f"the dataset needs a column '{name}', it has {sorted(columns)}")
        for row in range(min(probe, len(dataset))):
            self[row]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.dataset)

    def _row(self, row: int) -> Mapping[str, Any]:
        try:
            return self.dataset[row]
        except Exception as error:
            raise DatasetError(f"row {row} of the dataset cannot be read: {error}") from error

    def __getitem__(self, row: int) -> Example:
        """Return one row.

        Raises:
            DatasetError: It has no picture, or one that does not decode, no prompt, or an answer that is no text.
        """
        data = dict(self._row(row))
        pictures = _pictures(data.pop(self.image_column), row)
        prompt, answer = data.pop("prompt", None), data.pop("answer", None)
        if answer is not None and (not isinstance(answer, str) or not answer.strip()):
            raise DatasetError(f"answer of row {row} must be text or None, got {answer!r}")
        return Example(_conversation(prompt, pictures, row), answer, data)


def _pictures(value: Any, row: int) -> list[Image.Image]:
    """The pictures of a row, decoded, in RGB."""
    found = value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else [value]
    if not found or any(one is None for one in found):
        raise DatasetError(f"row {row} has no picture")
    try:
        opened = [one if isinstance(one, Image.Image) else Image.open(one) for one in found]
        return [picture.convert("RGB") for picture in opened]
    except Exception as error:
        raise DatasetError(f"a picture of row {row} does not decode: {type(error).__name__}: {error}") from error


def _conversation(prompt: Any, pictures: list[Image.Image], row: int) -> list[dict[str, Any]]:
    """Put the pictures at their placeholders, or in front of the first user message if there are none."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not _is_conversation(messages):
        raise DatasetError(f"prompt of row {row} must be text or messages with role and content, got {prompt!r}")
    contents: list[list[dict[str, Any]]] = [
        [{"type": "text", "text": message["content"]}]
        if isinstance(message["content"], str)
        else [{key: value for key, value in part.items() if value is not None} for part in message["content"]]
        for message in messages
    ]
    places = [part for content in contents for part in content if part.get("type") == "image"]
    if not places:
        first = next(i for i, message in enumerate(messages) if message["role"] == "user")
        places = [{"type": "image"} for _ in pictures]
        contents[first] = [*places, *contents[first]]
    if len(places) != len(pictures):
        raise DatasetError(f"row {row} has {len(pictures)} pictures for {len(places)} places in its prompt")
    for place, picture in zip(places, pictures, strict=True):
        place["image"] = picture
    return [{"role": m["role"], "content": content} for m, content in zip(messages, contents, strict=True)]


def _is_conversation(messages: Any) -> bool:
    """Whether `messages` is a non-empty list of messages, at least one of them the user's."""
    return (
        isinstance(messages, Sequence)
        and not isinstance(messages, (str, bytes))
        and bool(messages)
        and all(isinstance(m, Mapping) and m.get("content") and "role" in m for m in messages)
        and any(m["role"] == "user" for m in messages)
    )
