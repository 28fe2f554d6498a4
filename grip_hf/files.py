"""Files that are written whole or not at all: beside their place first, and then moved there."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import FileError

AnyPath = str | os.PathLike[str]


def write_whole(path: AnyPath, write: Callable[[Path], object]) -> None:
    """Let `write` fill a new file in the same folder, then put it in the place of `path`.

    Args:
        path: What to replace; its folder must be there.
        write: Called with the path of the new file, which has the same suffix.

    Raises:
        FileError: It cannot be written, as on a full disk; what was there before is still there.
    """
    target = Path(path)
    try:
        handle, name = tempfile.mkstemp(prefix=".", suffix=f".new{target.suffix}", dir=target.parent)
        os.close(handle)
    except OSError as error:
        raise FileError(f"{target} cannot be written: {error}") from error
    try:
        write(Path(name))
        os.chmod(name, 0o666 & ~_umask())  # temporary files are for their owner alone
        os.replace(name, target)
    except OSError as error:
        raise FileError(f"{target} cannot be written, and was left as it was: {error}") from error
    finally:
        Path(name).unlink(missing_ok=True)


def write_text(path: AnyPath, text: str) -> None:
    """Write a text as UTF-8, whole or not at all; raises `FileError`."""
    write_whole(path, lambda new: new.write_text(text, encoding="utf-8"))


def write_json(path: AnyPath, data: Any, indent: int = 1) -> None:
    """Write data as JSON, whole or not at all; raises `FileError`."""
    write_text(path, json.dumps(data, indent=indent) + "\n")


def check_writable(path: AnyPath) -> Path:
    """Find out whether a file can be written, before hours of work; writes nothing.

    Raises:
        FileError: Its folder is not there or takes no files, or the path is a folder itself.
    """
    target = Path(path).absolute()
    if target.is_dir():
        raise FileError(f"{path} is a folder, where a file is to be written")
    if not target.parent.is_dir():
        raise FileError(f"{path}: there is no folder {target.parent}")
    try:
        with tempfile.TemporaryFile(dir=target.parent) as trial:
            trial.write(b"x")
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error}") from error
    return Path(path)


def check_folder(path: AnyPath) -> Path:
    """Find out whether a folder is there, or can be made, and takes files; makes and writes nothing.

    Raises:
        FileError: It is not and cannot, or takes none.
    """
    folder = Path(path).absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        raise FileError(f"the folder {path} cannot be made: {there} is a file")
    check_writable(there / "trial")
    return Path(path)


def make_folder(path: AnyPath) -> Path:
    """Make a folder with those above it, and find out whether it takes files.

    Raises:
        FileError: It cannot be made, or takes none.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"the folder {folder} cannot be made: {error}") from error
    check_writable(folder / "trial")
    return folder


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
