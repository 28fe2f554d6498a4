"""`grip-hf compare`: methods on the same questions, with intervals that their pairing makes narrow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .screen import failures, say


def compare(
    file: Annotated[Path, typer.Argument(help="What `grip-hf eval --log-samples` wrote.")],
    first: Annotated[str, typer.Argument(help="A method.")],
    others: Annotated[list[str], typer.Argument(help="Others, each minus the first.")],
) -> None:
    """Print how many points other methods are above the first, at each budget, with 95 % intervals."""
    with failures():
        from ..errors import ConfigError
        from ..evaluation.differences import differences

        try:
            samples = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file} holds no lines of JSON: {error}") from error
        for other in others:
            for one in differences(samples, first, other):
                say(
                    f"{other} at {one.budget:g}: {100 * one.mean:+.1f} points "
                    f"({100 * one.low:+.1f} to {100 * one.high:+.1f}; {one.questions} questions)"
                )
