"""Pictures as data sets hold them: decoded, as bytes, as paths, or as data URLs."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from ..errors import DatasetError

Picture = Any  # a PIL picture, bytes, a path, a data URL, or a dict with one of them


def picture_list(value: Any) -> list[Picture]:
    """The pictures of a column's value, which is one picture or several."""
    several = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    return list(value) if several else [] if value is None else [value]


def unwrapped(value: Picture) -> Picture:
    """A picture without the dict around it: `{"bytes", "path"}` of `datasets`, or `{"url"}` of chat messages."""
    if not isinstance(value, Mapping):
        return value
    return next(
        (value[key] for key in ("bytes", "path", "url", "image", "base64") if value.get(key) is not None), None
    )


def open_picture(value: Picture, root: Path | None = None) -> Image.Image:
    """Decode a picture to its end, turned upright, in RGB.

    Args:
        value: The picture.
        root: What relative paths are relative to; None is the working directory.

    Raises:
        DatasetError: There is none, it lies on the web, or it does not decode.
    """
    source = unwrapped(value)
    if source is None:
        raise DatasetError("there is no picture")
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise DatasetError(f"a picture is an address ({source}); download it and give the file")
    try:
        with Image.open(BytesIO(content(source, root))) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except Exception as error:
        raise DatasetError(f"a picture does not decode: {type(error).__name__}: {error}") from error


def content(source: Any, root: Path | None = None) -> bytes:
    """The bytes of a picture's file; raises `OSError` if there is none."""
    if isinstance(source, bytes):
        return source
    if isinstance(source, str) and source.startswith("data:"):
        return base64.b64decode(source.partition(",")[2])
    if isinstance(source, str) and "://" in source:  # inside an archive, as `datasets` names it
        from datasets.download.streaming_download_manager import xopen

        with xopen(source, "rb") as file:
            return bytes(file.read())
    return (Path(root or "") / source).read_bytes()


def digest(value: Picture, root: Path | None = None) -> int:
    """A 64-bit number that equal pictures share, from the bytes of the file, or of the pixels of a decoded one."""
    source = unwrapped(value)
    data = source.tobytes() if isinstance(source, Image.Image) else content(source, root)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
