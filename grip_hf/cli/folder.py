"""The folder that a calibration goes to: that of a scorer, or a new one that can be used and shared as it is."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..files import make_folder, write_text

if TYPE_CHECKING:
    from ..config import GripConfig
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
    from ..hub.checkpoint import CONFIG_FILE
    from ..hub.share import write_card
    from ..patch import apply_grip, remove_grip

    model: Any = survey.loaded[0]
    handle = survey.chooser.apply(model)
    config, rows = with_default(handle.config, found), handle.tower.chosen_by
    apply_grip(model, config, scorer=handle.scorer, tower_selector=rows, calibration=found, force=survey.force)
    try:
        if (place / CONFIG_FILE).is_file():
            model.grip.tower.save(place)
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


def with_default(config: GripConfig, found: Calibration) -> GripConfig:
    """Settings with the default budget of a calibration; its weakest promise where the vision tower keeps too little.

    A quality has no such conflict: its looks keep as many rows as they need.
    """
    from ..evaluation.budgets import as_setting

    default = found.default_budget
    budget = {"keep_ratio": 0.25} if default is None else as_setting(default)
    tower = config.tower_keep_ratio
    if isinstance(tower, float) and budget.get("keep_ratio", 0.0) > tower:
        budget = {"quality": min(one.quality for one in found.promises)}
    return config.replace(**budget)
