"""Encode some pictures of a step at a time: how many fit, and which arguments are theirs. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def passes(pictures: list[int], totals: list[int], limit: int) -> Iterator[list[int]]:
    """Cut `pictures`, of `totals` visual tokens each, into runs of at most `limit` tokens, or of one picture."""
    run: list[int] = []
    for number in pictures:
        if run and sum(totals[one] for one in run) + totals[number] > limit:
            yield run
            run = []
        run.append(number)
    if run:
        yield run


def pick_items(kwargs: Mapping[str, Any], chosen: list[int], pictures: int, rows: str | None) -> dict[str, Any]:
    """The arguments of the `chosen` ones of several pictures; `rows` names the one with the rows of flat arguments."""
    if chosen == list(range(pictures)):
        return dict(kwargs)
    counts = [1] * pictures if rows is None else [int(torch.as_tensor(one).prod()) for one in kwargs[rows]]
    firsts = [sum(counts[:number]) for number in range(pictures)]
    flat = [row for number in chosen for row in range(firsts[number], firsts[number] + counts[number])]

    def pick(value: Any) -> Any:
        if not isinstance(value, (Tensor, list, tuple)) or (isinstance(value, Tensor) and not value.ndim):
            return value
        if len(value) not in (pictures, sum(counts)):
            return value
        index = chosen if len(value) == pictures else flat
        return value[index] if isinstance(value, Tensor) else [value[one] for one in index]

    return {name: pick(value) for name, value in kwargs.items()}
