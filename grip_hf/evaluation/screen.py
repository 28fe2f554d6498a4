"""Where the commands print their tables, and write their files."""

from pathlib import Path

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
