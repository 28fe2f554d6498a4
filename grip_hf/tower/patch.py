"""Build the part of a patch that drops rows within the vision tower, or say why there can be none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..config import GripConfig
from ..engine.choice import Score
from ..errors import ConfigError
from .drop import TowerDrops
from .facts import find_tower
from .selectors import TRAINING_FREE, get_tower_selector

if TYPE_CHECKING:
    from ..engine.hooks import Boundary


def make_tower(boundary: Boundary, config: GripConfig, selector: Score | None) -> TowerDrops:
    """The part of a patch that drops rows; nothing of the model is changed.

    Args:
        boundary: The patch.
        config: Its settings.
        selector: Chooses the rows; None takes what the settings name.

    Raises:
        UnsupportedModelError: The tower is not known.
        ConfigError: A setting does not fit the tower, or the selector of visual tokens.
    """
    tower = find_tower(boundary.parts, config.tower_depth)
    refuse_selector(boundary.selector)
    chosen = selector or get_tower_selector(config.tower_selector or TRAINING_FREE, config.seed)
    return TowerDrops(boundary, tower, chosen)


def refuse_selector(selector: Any) -> None:
    """Raise `ConfigError` for a selector of visual tokens that needs what dropped rows cannot give."""
    name = getattr(selector, "name", None) or type(selector).__name__
    if getattr(selector, "inside", False):
        raise ConfigError(
            f"selector {name!r} lets all visual tokens into the language model, those too whose rows the vision "
            "tower dropped; choose another selector, or tower_keep_ratio=None"
        )
    if needs := getattr(selector, "needs", ()):
        raise ConfigError(
            f"selector {name!r} needs {', '.join(needs)} of all rows of the vision tower, of which tower_keep_ratio "
            "drops some; choose another selector, or tower_keep_ratio=None"
        )
