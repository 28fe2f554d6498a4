"""The folder that a calibration goes to: that of a scorer, or a new one that can be used and shared as it is."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..files import make_folder, write_text

if TYPE_CHECKING:
    from ..quality.promise import Calibration
    from .survey import Survey


def place_of(output: Path | None, scorer: str | None) -> Path:
    """Where to write; raises `ConfigError` if nothing says where."""
    if output is not None:
        return output
    if scorer is None or not Path(scorer).is_dir():
        raise ConfigError("give --output FOLDER: there is no folder of a scorer to write to")
    return Path(scorer)


def save(survey: Survey, found: Calibration, place: Path) -> None:
    """Write a calibration, settings with its default budget, a card, and, in a new folder, the scorer.

    Args:
        survey: What was calibrated.
        found: The calibration.
        place: The folder.

    Raises:
        FileError: It cannot be written; what was there before is still there.
    """
    from ..evaluation.budgets import as_setting
    from ..hub.checkpoint import CONFIG_FILE
    from ..hub.share import write_card
    from ..patch import apply_grip, remove_grip

    model: Any = survey.loaded[0]
    handle = survey.chooser.apply(model)
    default = found.default_budget
    budget = {"keep_ratio": 0.25} if default is None else as_setting(default)
    config = handle.config.replace(**budget)
    apply_grip(model, config, scorer=handle.scorer, calibration=found, force=survey.force)
    try:
        if (place / CONFIG_FILE).is_file():
            found.save(place)
            write_text(place / CONFIG_FILE, config.to_json())
            write_card(model.grip, place)
            return
        make_folder(place.parent)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=".") as beside:
            whole = Path(beside) / "whole"
            model.grip.save_pretrained(whole)
            make_folder(place)
            for file in whole.iterdir():
                os.replace(file, place / file.name)
    finally:
        remove_grip(model)
