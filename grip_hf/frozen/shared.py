"""Encoded pictures in a folder: each computed once, by whichever process needs it first, and read by all others."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import FileError
from ..families.table import Parts
from ..files import make_folder, write_whole
from .samples import Encoded

try:
    import fcntl
except ImportError:  # not on Windows; there two processes may encode the same picture at once
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)
FEATURES, TAP = "features", "tap:"
SPARE_BYTES, SPARE_SHARE = 1 << 30, 0.1  # of a disk are left free, whichever is less
SAMPLED = 64  # values of each weight that tell models apart


class SharedPictures:
    """A folder of encoded pictures.

    Args:
        folder: Where; made if it is missing. Processes on several machines share it if their disk is shared.
        mark: What tells encoded pictures of this kind from others, see `fingerprint`.

    Raises:
        FileError: It takes no files.
    """

    def __init__(self, folder: Path, mark: str) -> None:
        self.folder = folder / mark
        make_folder(self.folder)
        self.full = False

    def get(self, key: str, encode: Callable[[], Encoded], device: torch.device) -> Encoded:
        """A picture, read from the folder, or encoded and left there.

        Args:
            key: What tells it from other pictures, in hexadecimal digits.
            encode: Computes it.
            device: Where it goes.
        """
        path = self.folder / f"{key}.safetensors"
        found = _read(path, device)
        if found is not None or self.full:
            return encode() if found is None else found
        # One lock for many pictures: who waits for another one waits for a single picture.
        with _locked(self.folder / f"{key[:2]}.lock"):
            found = _read(path, device)
            if found is None:
                found = encode()
                self._keep(path, found)
        return found

    def _keep(self, path: Path, encoded: Encoded) -> None:
        usage = shutil.disk_usage(self.folder)
        if usage.free - encoded.nbytes > min(SPARE_BYTES, SPARE_SHARE * usage.total):
            with contextlib.suppress(FileError):
                write_whole(path, partial(_write, encoded))
                return
        self.full = True
        logger.warning("%s takes no more encoded pictures: each process encodes further ones by itself", self.folder)


def fingerprint(parts: Parts) -> str:
    """What tells the encoded pictures of a model from those of another, from some of the values of each weight."""
    digest = hashlib.sha256(type(parts.base).__name__.encode())
    for name, weight in parts.base.state_dict().items():
        if isinstance(weight, Tensor) and not name.startswith(parts.family.language_model):
            some = weight.detach().flatten()[:: max(1, weight.numel() // SAMPLED)][:SAMPLED]
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)} {some.float().tolist()}".encode())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Within the block, no other process holds this lock; one that dies lets go of it."""
    with path.open("w", encoding="utf-8") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(encoded: Encoded, path: Path) -> None:
    several = not isinstance(encoded.features, Tensor)
    parts = dict(enumerate(encoded.features)) if several else {0: encoded.features}
    named = {f"{FEATURES}{number:04}": part.contiguous() for number, part in parts.items()}
    named |= {f"{TAP}{name}": tap.contiguous() for name, tap in encoded.taps.items()}
    # Parts of one tensor share its memory, which a file may not.
    save_file({name: value.cpu().clone() for name, value in named.items()}, path, {"several": str(several)})


def _read(path: Path, device: torch.device) -> Encoded | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            several = file.metadata()["several"] == "True"
            found: Mapping[str, Any] = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, OSError, KeyError, TypeError):
        return None  # not whole: it is made again
    parts = [value for name, value in found.items() if name.startswith(FEATURES)]
    taps = {name.removeprefix(TAP): value for name, value in found.items() if name.startswith(TAP)}
    return Encoded(tuple(parts) if several else parts[0], taps)
