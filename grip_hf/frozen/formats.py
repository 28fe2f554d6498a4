"""Which columns of a data set hold the pictures, the question and the answer, in the forms that people have.

Known are TRL's `images` + `messages`, `prompt` + `completion` and preference data (`chosen`), LLaVA's `conversations`,
`question` + `answer` or `answers`, and chats with the pictures inside their parts.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DatasetError
from .pictures import Picture, picture_list

IMAGES = ("images", "image", "image_path", "image_paths", "img")
CHATS = ("messages", "conversations", "conversation")
QUESTIONS = ("prompt", "question", "query", "instruction")
ANSWERS = ("answer", "answers", "completion", "chosen", "response", "output", "multiple_choice_answer")
ROLES = {
    **{name: name for name in ("system", "user", "assistant", "tool")},
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
PLACE = re.compile(r"\s*<image>\s*")
Messages = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class RowQuestion:
    """One question of a row, its pictures as the data set holds them.

    Attributes:
        messages: The conversation up to the question: roles, and contents as lists of parts.
        pictures: Those of the row's own column, for the places that are still empty.
        answers: What is right, as often as people said it; none takes what the model says. The first is trained on.
    """

    messages: Messages
    pictures: list[Picture]
    answers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Format:
    """What was found where.

    Attributes:
        image: Column of the pictures; "" where they are inside the messages.
        question: Column of the question or the conversation.
        answers: Columns of the answers; none where they are the assistant's turns, or there are none.
        chat: Whether each turn of the assistant is an answer, and what comes before it the question.
        unused: All other columns, which reach the reward functions.
        root: What relative paths of pictures are relative to.
    """

    image: str
    question: str
    answers: tuple[str, ...]
    chat: bool
    unused: tuple[str, ...]
    root: Path | None = None

    def __str__(self) -> str:
        relative = f", paths relative to {self.root}" if self.root else ""
        pictures = f"column {self.image!r}{relative}" if self.image else f"inside {self.question!r}{relative}"
        answers = " and ".join(map(repr, self.answers)) or "none: the model's own are taken"
        if self.chat:
            answers = f"each turn of the assistant in {self.question!r}"
        unused = ", ".join(map(repr, self.unused)) or "none"
        return f"pictures: {pictures}; questions: {self.question!r}; answers: {answers}; not used: {unused}"

    def turns(self, row: Mapping[str, Any]) -> int:
        """How many questions a row holds, at least one."""
        return max(1, len(_answered(_chat(row[self.question])))) if self.chat else 1

    def question_of(self, row: Mapping[str, Any], turn: int = 0) -> RowQuestion:
        """One question of a row.

        Raises:
            DatasetError: There is no prompt, or an answer that is empty or no text.
        """
        pictures = picture_list(row[self.image]) if self.image else []
        if self.chat:
            messages = _chat(row[self.question])
            places = _answered(messages)
            if not places:
                return RowQuestion(_checked(messages), pictures, ())
            history = messages[: places[turn]]
            if sum(map(_is_empty, _parts(messages))) == len(pictures):  # those of later turns are not seen yet
                pictures = pictures[: sum(map(_is_empty, _parts(history))) or None]
            return RowQuestion(_checked(history), pictures, (_said(messages[places[turn]]),))
        value = row[self.question]
        messages = [_message("user", value)] if isinstance(value, str) else _chat(value)
        votes: list[str] = []
        for name in reversed(self.answers):  # the last column has all that are right, the first the one to train on
            implicit, texts = _answer(row[name], name)
            messages = implicit if name == self.question else messages
            if votes and texts and texts[0] in votes:
                votes.remove(texts[0])
            votes = [*texts, *votes]
        return RowQuestion(_checked(messages), pictures, tuple(votes))


def recognise(columns: Sequence[str], first: Mapping[str, Any], root: Path | None = None) -> Format:
    """Find out which columns hold what.

    Args:
        columns: Names of all columns.
        first: The first row.
        root: What relative paths of pictures are relative to.

    Raises:
        DatasetError: There are no pictures or no questions; the message says what was found.
    """
    image = next((name for name in IMAGES if name in columns), "")
    chat = next((name for name in CHATS if name in columns and _is_list(first.get(name))), "")
    question = chat or next((name for name in QUESTIONS if name in columns), "")
    if not question and _is_list(first.get("chosen")):
        question = "chosen"  # preference data whose prompt is the beginning of both answers
    has = f"it has {sorted(columns)}"
    if not question:
        if "label" in columns and image:
            raise DatasetError(
                f"these are pictures sorted into classes ({has}): a model is asked questions; add a metadata.jsonl "
                'with lines like {"file_name": "a.jpg", "prompt": "...", "answer": "..."}'
            )
        raise DatasetError(f"the dataset needs a column 'prompt', 'question' or 'messages', {has}")
    answers = [] if chat else [name for name in ANSWERS if name in columns]
    pair = ["answer", "answers"]  # one to train on, and all that are right
    answers = pair if set(pair) <= set(answers) else answers[:1]
    if not chat and not answers and _is_list(first.get(question)):
        chat = question if _answered(_chat(first[question])) else ""
    if not image and not (_is_list(first.get(question)) and any(map(_is_picture, _parts(_chat(first[question]))))):
        raise DatasetError(f"the dataset needs a column 'image' or 'images', or pictures in its messages, {has}")
    unused = [name for name in columns if name not in {image, question, *answers}]
    return Format(image, question, tuple(answers), bool(chat), tuple(unused), root)


def _answer(value: Any, name: str) -> tuple[Messages, list[str]]:
    """What a column of answers says: the conversation that an implicit prompt has before it, and the answers."""
    if value is None:
        return [], []
    found: list[Any] = list(value) if _is_list(value) else [value]
    if found and all(isinstance(one, Mapping) and ("role" in one or "from" in one) for one in found):
        messages = _chat(found)
        last = _answered(messages, with_user=False)
        if not last:
            raise DatasetError(f"{name} holds no turn of the assistant")
        return messages[: last[-1]], [_said(messages[last[-1]])]
    texts = [one.get("answer") if isinstance(one, Mapping) else one for one in found]
    if not texts or not all(isinstance(one, str) and one.strip() for one in texts):
        raise DatasetError(f"{name} must be text or None, got {value!r}")
    if name == "answers" and len(texts) > 1:  # the most frequent one first: it is trained on
        texts = sorted(texts, key=texts.count, reverse=True)
    return [], [str(one) for one in texts]


def _chat(value: Any) -> Messages:
    """Messages with roles and lists of parts, from any spelling; raises `DatasetError` if it is none."""
    if not _is_list(value):
        raise DatasetError(f"prompt must be text or messages with role and content, got {value!r}")
    messages = []
    for one in value:
        role = ROLES.get(str(one.get("role") or one.get("from")).lower()) if isinstance(one, Mapping) else None
        if role is None:
            raise DatasetError(f"prompt must be text or messages with role and content, got {value!r}")
        said = one.get("content") if one.get("content") is not None else one.get("value")
        messages.append(_message(role, said))
    return messages


def _message(role: str, said: Any) -> dict[str, Any]:
    """A message; `<image>` in a text is the place of a picture."""
    if isinstance(said, str):
        texts: list[Any] = PLACE.split(said) if role != "assistant" else [said]
        parts: list[dict[str, Any]] = [{"type": "text", "text": texts[0]}] if texts[0] else []
        for text in texts[1:]:
            parts += [{"type": "image"}, *([{"type": "text", "text": text}] if text else [])]
        return {"role": role, "content": parts}
    if not _is_list(said) or not all(isinstance(part, Mapping) for part in said):
        raise DatasetError(f"prompt must be text or messages with role and content, got {said!r}")
    return {"role": role, "content": [_part(part) for part in said]}


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a message, a picture of any spelling as `{"type": "image", "image": ...}`."""
    kept = {key: value for key, value in part.items() if value is not None}
    if kept.get("type") not in ("image", "image_url"):
        return kept
    source = next((kept[key] for key in ("image", "image_url", "url", "path", "base64") if key in kept), None)
    return {"type": "image"} if source is None else {"type": "image", "image": source}


def _answered(messages: Messages, with_user: bool = True) -> list[int]:
    """Places of the assistant's turns, each with a user's before it if that is asked for."""
    first = next((i for i, one in enumerate(messages) if one["role"] == "user"), len(messages) if with_user else -1)
    return [i for i, one in enumerate(messages) if one["role"] == "assistant" and i > first]


def _said(message: Mapping[str, Any]) -> str:
    text = "".join(part.get("text", "") for part in message["content"])
    if not text.strip():
        raise DatasetError(f"answer must be text, got {text!r}")
    return text.strip()


def _checked(messages: Messages) -> Messages:
    if not any(one["role"] == "user" and one["content"] for one in messages):
        raise DatasetError(f"prompt must have a message of the user, got {messages!r}")
    return messages


def _parts(messages: Messages) -> Iterator[dict[str, Any]]:
    return (part for message in messages for part in message["content"])


def _is_picture(part: Mapping[str, Any]) -> bool:
    return part.get("type") == "image"


def _is_empty(part: Mapping[str, Any]) -> bool:
    """Whether this is the place of a picture that the row's own column holds."""
    return _is_picture(part) and "image" not in part


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and bool(value)
