"""Build the part of a patch that drops rows within the vision tower, or say why there can be none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..config import GripConfig
from ..engine.choice import Score, drops_inside
from ..errors import ConfigError, ScorerError, UnsupportedModelError
from .drop import TowerDrops
from .facts import Tower, attends, find_tower, width_of
from .scorer import TowerGripSelector, TowerScorer
from .selectors import TOWER_SELECTORS, TRAINING_FREE, get_tower_selector

if TYPE_CHECKING:
    from ..engine.hooks import Boundary


LEARNED = "grip"


def make_tower(
    boundary: Boundary, config: GripConfig, selector: Score | None, scorer: TowerScorer | None = None
) -> TowerDrops:
    """The part of a patch that drops rows; nothing of the model is changed.

    Args:
        boundary: The patch.
        config: Its settings.
        selector: Chooses the rows; None takes what the settings name.
        scorer: The tower scorer that lies beside the scorer, if any: it chooses unless another one is named.

    Raises:
        UnsupportedModelError: The tower is not known.
        ConfigError: A setting does not fit the tower, or the selector of visual tokens.
        ScorerError: There is no tower scorer, or it was made for another tower, or another depth.
    """
    name = config.tower_selector or (TRAINING_FREE if scorer is None else LEARNED)
    if selector is None and name == LEARNED:
        if scorer is None:
            raise ScorerError(
                f"tower_selector={LEARNED!r} needs a tower scorer, and none lies beside the scorer; train one "
                f"(grip-hf train-tower), or choose {', '.join(sorted(TOWER_SELECTORS))}"
            )
        selector = TowerGripSelector(scorer)
    learned = getattr(selector, "scorer", None)
    depth = config.tower_depth
    if depth is None and isinstance(learned, TowerScorer):
        depth = learned.config.depth
    tower = find_tower(boundary.parts, depth)
    refuse_selector(boundary.selector)
    if isinstance(learned, TowerScorer):
        check_fits(learned, tower, boundary)
    chosen = selector or get_tower_selector(name, config.seed)
    if getattr(chosen, "attends", False) and not attends(tower):
        raise UnsupportedModelError(
            f"tower_selector={name!r} needs attention of the vision tower, and that of {type(tower.module).__name__} "
            f"is not known; choose another one of {', '.join(sorted(TOWER_SELECTORS))}"
        )
    return TowerDrops(boundary, tower, chosen)


def check_fits(scorer: TowerScorer, tower: Tower, boundary: Boundary) -> None:
    """Raise `ScorerError` if a tower scorer was made for another tower, or for another depth of it."""
    language: Any = boundary.parts.language_model.config
    mine = {"hidden_size": width_of(tower), "text_size": language.hidden_size, "depth": tower.first}
    wrong = [name for name, value in mine.items() if getattr(scorer.config, name) != value]
    wrong = [name for name in wrong if name != "text_size" or scorer.config.query_aware]
    if wrong:
        raise ScorerError(
            f"this tower scorer is made for {', '.join(f'{n} {getattr(scorer.config, n)}' for n in wrong)}, but "
            f"{type(boundary.parts.owner).__name__} has {', '.join(f'{n} {mine[n]}' for n in wrong)}"
        )


def refuse_selector(selector: Any) -> None:
    """Raise `ConfigError` for a selector of visual tokens that needs what dropped rows cannot give."""
    name = getattr(selector, "name", None) or type(selector).__name__
    if drops_inside(selector):
        raise ConfigError(
            f"selector {name!r} lets all visual tokens into the language model, those too whose rows the vision "
            "tower dropped; choose another selector, or tower_keep_ratio=None"
        )
    if needs := getattr(selector, "needs", ()):
        raise ConfigError(
            f"selector {name!r} needs {', '.join(needs)} of all rows of the vision tower, of which tower_keep_ratio "
            "drops some; choose another selector, or tower_keep_ratio=None"
        )
