"""Scorers and checkpoints on disk: written so that a stop in between never leaves half of one to load."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..config import GripConfig
from ..errors import CheckpointError as CheckpointError
from ..errors import FileError
from ..hub.checkpoint import CONFIG_FILE

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
STATE = "trainer_state.json"
NAME = re.compile(r"checkpoint-(\d+)")


def save_scorer(scorer: PreTrainedModel, folder: str | os.PathLike[str], config: GripConfig | None = None) -> Path:
    """Write a scorer beside its place and then move it there, replacing its files one by one, the weights last.

    Args:
        scorer: The scorer.
        folder: Where to.
        config: Settings to write with it, so that `apply_grip` finds a budget.

    Raises:
        FileError: It cannot be written, as on a full disk; what was there before is still there.
    """
    target = Path(folder)
    fresh = target.with_name(target.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        scorer.save_pretrained(fresh)
        if config is not None:
            config.to_json(fresh / CONFIG_FILE)
        target.mkdir(parents=True, exist_ok=True)
        for path in sorted(fresh.iterdir(), key=lambda path: path.suffix == ".safetensors"):
            os.replace(path, target / path.name)
        fresh.rmdir()
    except (OSError, SafetensorError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise FileError(f"the scorer cannot be written to {target}: {error}") from error
    return target


@contextlib.contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Within the block a trainer writes checkpoints to `folder`; one that it leaves half-written is taken away.

    Raises:
        FileError: That happened, as on a full disk, which torch and safetensors report in errors of many kinds.
    """
    before = set(_torn(folder))
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        torn = [path for path in _torn(folder) if path not in before]
        if not torn and getattr(error, "errno", None) not in NO_ROOM:
            raise
        for path in torn:
            shutil.rmtree(path, ignore_errors=True)
        good = next((path.name for path in _checkpoints(folder) if path not in _torn(folder)), None)
        free = shutil.disk_usage(folder).free >> 20
        raise FileError(
            f"{torn[0] if torn else folder} cannot be written ({free} MiB are free): {str(error).splitlines()[0]}. "
            f"{f'{good} is kept' if good else 'There is no earlier checkpoint'}; make room and give the same command"
        ) from error


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    found = [(int(m[1]), path) for path in folder.glob("checkpoint-*") if (m := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _torn(folder: Path) -> list[Path]:
    """Checkpoints that were cut off: the Trainer writes its state last."""
    return [path for path in _checkpoints(folder) if _read(path / STATE) is None]


def _read(path: Path) -> Any:
    """The JSON in a file, or None."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def last_checkpoint(folder: str | os.PathLike[str], hidden_size: int) -> str | None:
    """The newest complete checkpoint of a run, or None if there is none.

    `transformers.trainer_utils.get_last_checkpoint` does not look inside, and would take one that was cut off.

    Raises:
        CheckpointError: It belongs to a model of another width.
    """
    for path in _checkpoints(Path(folder)):
        config = _read(path / "config.json")
        if _read(path / STATE) is None or config is None:
            continue
        made_for = (config.get("scorer") or config).get("hidden_size")
        if made_for != hidden_size:
            raise CheckpointError(
                f"{path} holds a scorer for tokens of width {made_for}, this model has {hidden_size}; "
                "give another output folder, or the model that it was trained for"
            )
        return str(path)
    return None
