"""Scorers and checkpoints on disk: written so that a stop in between never leaves half of one to load."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from ..errors import CheckpointError as CheckpointError
from ..scorer.model import GripScorer

STATE = "trainer_state.json"


def save_scorer(scorer: GripScorer, folder: str | os.PathLike[str]) -> Path:
    """Write a scorer beside its place and then move it there, replacing its files one by one, the weights last."""
    target = Path(folder)
    fresh = target.with_name(target.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    scorer.save_pretrained(fresh)
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(fresh.iterdir(), key=lambda path: path.suffix == ".safetensors"):
        os.replace(path, target / path.name)
    fresh.rmdir()
    return target


def last_checkpoint(folder: str | os.PathLike[str], hidden_size: int) -> str | None:
    """The newest complete checkpoint of a run, or None if there is none.

    The Trainer writes its state last, so a checkpoint without a readable one was cut off and is passed over.

    Raises:
        CheckpointError: It belongs to a model of another width.
    """
    found = [
        (int(m[1]), path)
        for path in Path(folder).glob("checkpoint-*")
        if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    for _, path in sorted(found, reverse=True):
        try:
            json.loads((path / STATE).read_text())
            config = json.loads((path / "config.json").read_text())
        except (OSError, json.JSONDecodeError):
            continue
        made_for = (config.get("scorer") or config).get("hidden_size")
        if made_for != hidden_size:
            raise CheckpointError(
                f"{path} holds a scorer for tokens of width {made_for}, this model has {hidden_size}; "
                "give another output folder, or the model that it was trained for"
            )
        return str(path)
    return None
