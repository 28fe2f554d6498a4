"""What the commands share: where they print their tables and write their files, and lists separated by commas."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

console = Console()
if not console.is_terminal:
    console.width = 160  # a file or a log has no width of its own


def in_folder(file: Path | None) -> Path | None:
    """Refuse a file in a folder that is not there: as a callback of an option, before any work is done."""
    if file is not None and not file.absolute().parent.is_dir():
        raise typer.BadParameter(f"{file}: there is no folder {file.absolute().parent}")
    return file


JsonFile = Annotated[Path | None, typer.Option("--json", callback=in_folder, help="Where to write the same as data.")]


def split_list(text: str) -> list[str]:
    """The parts of a list separated by commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str, kind: type = float, wanted: str = "numbers") -> list[Any]:
    """The numbers of a list separated by commas; `wanted` says in the error what they should be."""
    try:
        return [kind(part) for part in split_list(text)]
    except ValueError:
        raise typer.BadParameter(f"expected {wanted} separated by commas, got {text!r}") from None
