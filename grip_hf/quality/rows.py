"""Some rows of a batch: the arguments of `generate` for them, and their part of pictures that are encoded already."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from ..engine.once import Encoded
from ..engine.taps import attach_taps, attached_taps
from ..engine.upstream import DEEPSTACK, ENCODED, FEATURES

Spans = list[tuple[int, int]]


class CannotPickError(Exception):
    """Nobody here can tell which part of an argument belongs to which row."""


def counts(ids: Tensor, token_ids: Sequence[int]) -> list[list[int]]:
    """The numbers of placeholders per row: of all kinds together, and of each kind by itself."""
    kinds = [torch.isin(ids, torch.tensor(list(token_ids), device=ids.device))]
    if len(token_ids) > 1:
        kinds += [ids == one for one in token_ids]
    return [kind.sum(1).tolist() for kind in kinds]


def sizes(features: Any) -> list[int]:
    """How many visual tokens each item of encoded pictures has: pictures, tiles, or single tokens.

    Raises:
        CannotPickError: They have a form that is not known.
    """
    if isinstance(features, Tensor) and features.ndim in (2, 3):
        return [1 if features.ndim == 2 else features.shape[1]] * len(features)
    if isinstance(features, (list, tuple)) and all(isinstance(one, Tensor) and one.ndim >= 2 for one in features):
        return [one[..., 0].numel() for one in features]
    raise CannotPickError(f"encoded pictures are a {type(features).__name__}")


def spans(items: Sequence[int], per_row: Sequence[int]) -> Spans | None:
    """The range of items of each row, or None if they do not add up to what the rows have."""
    ends = {total: number for number, total in enumerate(accumulate(items, initial=0))}
    borders = list(accumulate(per_row, initial=0))
    if borders[-1] != sum(items) or not set(borders) <= set(ends):
        return None
    # Rows without pictures come between items; the first border of a size is as good as any, sizes being positive.
    places = [ends[border] for border in borders]
    return list(pairwise(places))


def chosen(span: Spans, rows: Sequence[int]) -> list[int]:
    """Numbers of the items of some rows."""
    return [item for row in rows for item in range(*span[row])]


def _cut(features: Any, per_row: Sequence[int], rows: Sequence[int]) -> Any:
    span = spans(sizes(features), per_row)
    if span is None:
        raise CannotPickError("encoded pictures do not end where the rows do")
    places = chosen(span, rows)
    if isinstance(features, Tensor):
        return features[torch.tensor(places, dtype=torch.long, device=features.device)]
    return type(features)(features[place] for place in places)


class Rows:
    """Picks rows of one batch, again and again.

    Args:
        given: The arguments of `generate`, by name.
        ids_name: Which of them is the prompt.
        token_ids: Ids of placeholders.
        encoders: Names of the arguments that the methods that encode pictures read: nothing of them is needed once
            pictures are encoded, unless others read them too.
    """

    def __init__(
        self, given: Mapping[str, Any], ids_name: str, token_ids: Sequence[int], encoders: Collection[str]
    ) -> None:
        self.given, self.ids_name, self.encoders = given, ids_name, encoders
        self.shape = given[ids_name].shape
        self.counts = counts(given[ids_name], token_ids)

    def pick(
        self, rows: Sequence[int], encoded: Mapping[str, list[Encoded]], anew: bool = False
    ) -> tuple[dict[str, Any], Callable[..., Any]]:
        """The arguments for some rows, and a function that cuts encoded pictures down to them.

        Args:
            rows: Numbers of the rows.
            encoded: What each method has encoded.
            anew: Whether the pictures of these rows are to be encoded again, so that all arguments count.

        Raises:
            CannotPickError: Some argument cannot be told apart by row.
        """
        outputs = [one for calls in encoded.values() for one, _ in calls]
        given = self.given.get(ENCODED)
        outputs += [one for one in (given or {}).values() if one is not None]
        if not outputs or any(len(calls) != 1 for calls in encoded.values()):
            raise CannotPickError("pictures are encoded in several calls, or by nobody who is known")
        items: dict[int, Spans | None] = {}
        for one in outputs:
            found_sizes = sizes(one[FEATURES])
            span = spans(found_sizes, self._per_row(one))
            if items.setdefault(len(found_sizes), span) != span:
                raise CannotPickError("pictures and videos are as many, so that their arguments cannot be told apart")
        index = torch.tensor(rows, dtype=torch.long)
        found = dict(self.given)
        for name, value in self.given.items():
            if name == ENCODED and value is not None:
                found[name] = {kind: one and self.cut(one, rows) for kind, one in value.items()}
            elif not isinstance(value, Tensor) or value.ndim == 0:
                continue
            elif value.shape[:2] == self.shape:
                found[name] = value[index.to(value.device)]
            elif items.get(len(value)) is not None:
                places = torch.tensor(chosen(items[len(value)] or [], rows), dtype=torch.long, device=value.device)
                found[name] = value[places]
            elif anew and len(outputs) == 1 and name in self.encoders and (each := self._each(value, outputs[0])):
                found[name] = _rows_of(value, [each * count for count in self._per_row(outputs[0])], rows)
            elif anew or name not in self.encoders:
                raise CannotPickError(f"{name} of shape {tuple(value.shape)} cannot be told apart by row")
        return found, lambda one: (self.cut(one[0], rows), self._taps(one, rows))

    def _each(self, value: Tensor, output: Any) -> int:
        """How many entries of packed pixels make a visual token; 0 if they are none."""
        total = sum(sizes(output[FEATURES]))
        return 0 if len(value) % total else len(value) // total

    def _per_row(self, output: Any) -> list[int]:
        """How many of its visual tokens each row has."""
        items = sizes(output[FEATURES])
        for per_row in self.counts:
            if spans(items, per_row) is not None:
                return per_row
        raise CannotPickError("encoded pictures are not as many tokens as the prompts have places")

    def cut(self, output: Any, rows: Sequence[int]) -> Any:
        """Encoded pictures of some rows, with their taps; what is none per visual token stays whole."""
        per_row = self._per_row(output)
        values = {**output, FEATURES: _cut(output[FEATURES], per_row, rows)}
        if output.get(DEEPSTACK) is not None:
            values[DEEPSTACK] = [_cut(layer, per_row, rows) for layer in output[DEEPSTACK]]
        fresh = type(output)(**values)
        taps = attached_taps(output)
        if taps:
            attach_taps(fresh, {name: _rows_of(tap, per_row, rows) for name, tap in taps.items()})
        return fresh

    def _taps(self, one: Encoded, rows: Sequence[int]) -> dict[str, Tensor]:
        per_row = self._per_row(one[0])
        return {name: _rows_of(tap, per_row, rows) for name, tap in one[1].items()}


def _rows_of(tap: Tensor, per_row: Sequence[int], rows: Sequence[int]) -> Tensor:
    """The part of some rows of a tensor [tokens, ...]; one without any says something of all."""
    if not len(tap):
        return tap
    span = spans([1] * len(tap), per_row)
    if span is None:
        raise CannotPickError("taps are not one row per visual token")
    return tap[torch.tensor(chosen(span, rows), dtype=torch.long, device=tap.device)]
