"""What the commands share: where they print, how they fail, and how they read lists."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..errors import ConfigError, FileError, GripError
from ..files import check_writable

console = Console()
if not console.is_terminal:
    console.width = 160  # a file or a log has no width of its own
# What libraries say of their own future, or of what they have just put right.
NOISE = ("The tokenizer has new PAD/BOS/EOS", "mtime may not be reliable", "Failed to load CPU gemm_4bit_forward")
TALKERS = ("transformers.trainer", "transformers.trainer_utils", "bitsandbytes.backends.cpu.ops")


def say(text: str) -> None:
    """Print a sentence, which is never broken into lines."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


@contextlib.contextmanager
def failures() -> Iterator[None]:
    """Within the block errors that grip_hf raises on purpose end the program with their message alone."""
    try:
        yield
    except FileError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    except GripError as error:
        raise typer.BadParameter(str(error)) from error


def quiet() -> None:
    """Leave out what nobody can act on: bars outside a terminal, and what libraries say of themselves."""
    from transformers.utils import logging as upstream

    for name in TALKERS:
        logging.getLogger(name).addFilter(lambda record: not record.getMessage().startswith(NOISE))
    for kind in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=kind, module=r"(transformers|trl|torch|accelerate|datasets)\b")
    if not sys.stderr.isatty():
        upstream.disable_progress_bar()
        with contextlib.suppress(ImportError):
            import datasets

            datasets.disable_progress_bars()


def in_folder(file: Path | None) -> Path | None:
    """Refuse a file that cannot be written: as a callback of an option, before any work is done."""
    try:
        return None if file is None else check_writable(file)
    except FileError as error:
        raise typer.BadParameter(str(error)) from error


JsonFile = Annotated[Path | None, typer.Option("--json", callback=in_folder, help="Where to write the same as data.")]


def tower_choice(ratios: str | None, selector: str | None, depth: float | None) -> Any:
    """The rows of the vision tower that options ask for; None if they ask for all.

    Raises:
        BadParameter: There are no ratios for the other two, or a value is not allowed.
    """
    if ratios is None:
        if selector is not None or depth is not None:
            raise typer.BadParameter("--tower-selector and --tower-depth go with --tower-keep-ratio")
        return None
    from ..config import AUTO
    from ..evaluation.towers import TowerChoice

    found = [
        one if one == AUTO else numbers(one, wanted="--tower-keep-ratio: numbers")[0] for one in split_list(ratios)
    ]
    with failures():
        return TowerChoice(tuple(found), selector, depth)


def split_list(text: str) -> list[str]:
    """The parts of a list separated by commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str, kind: type = float, wanted: str = "numbers") -> list[Any]:
    """The numbers of a list separated by commas; `wanted` says in the error what they should be."""
    try:
        return [kind(part) for part in split_list(text)]
    except ValueError:
        raise typer.BadParameter(f"expected {wanted} separated by commas, got {text!r}") from None


def budget_list(text: str) -> list[float | int]:
    """Budgets separated by commas: keep ratios such as 0.25 or 25%, or whole numbers > 1 of visual tokens."""
    from ..evaluation.budgets import parse_budget

    try:
        return [parse_budget(part) for part in split_list(text)]
    except ConfigError as error:
        raise typer.BadParameter(f"expected keep ratios or numbers of tokens, separated by commas: {error}") from None
