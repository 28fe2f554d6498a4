"""Pruning inside the vision tower, as something that is evaluated and timed: with it and without it, side by side."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..config import check_tower
from ..engine.choice import Score
from ..errors import ConfigError
from ..families.table import find_parts
from ..hub.checkpoint import attached_folder
from ..hub.resolve import LEARNED
from ..tower.facts import find_tower, width_of
from ..tower.part import FOLDER
from ..tower.patch import refuse_selector
from ..tower.scorer import TowerGripSelector, TowerScorer, TowerScorerConfig
from ..tower.selectors import get_tower_selector
from .methods import Pruned

PLUS = " + tower "


def tower_label(selector: str, ratio: float | str | None) -> str:
    """What tables call a selector with a share of the vision tower's rows."""
    return selector if ratio is None else f"{selector}{PLUS}{ratio if isinstance(ratio, str) else f'{ratio:g}'}"


@dataclasses.dataclass(frozen=True)
class TowerChoice:
    """Which rows stay.

    Attributes:
        ratios: Shares of the rows to try, each in (0, 1] or "auto".
        selector: What chooses them: a name, the folder of a tower scorer, or a selector; None takes the tower scorer
            that came with the model.
        depth: After how many layers, or which share of them.

    Raises:
        ConfigError: A ratio is not allowed.
    """

    ratios: tuple[float | str, ...]
    selector: str | Score | None = None
    depth: float | None = None

    def __post_init__(self) -> None:
        for ratio in self.ratios:
            check_tower(ratio)

    def as_settings(self) -> dict[str, Any]:
        """Arguments of `apply_grip` for a single ratio, which takes what it takes where no selector is named.

        Raises:
            ConfigError: There are several ratios.
            ScorerError: The tower scorer cannot be loaded.
        """
        if len(self.ratios) != 1:
            raise ConfigError(f"tower_keep_ratio must be one share of the rows here, or auto, got {list(self.ratios)}")
        chosen = self.selector
        if isinstance(chosen, str) and os.path.isdir(chosen):
            chosen = TowerGripSelector(TowerScorer.from_folder(chosen))
        depth = {} if self.depth is None else {"tower_depth": self.depth}  # else that of the saved settings
        return {"tower_keep_ratio": self.ratios[0], "tower_selector": chosen, **depth}

    def settings(self, model: Any, seed: int, fresh: bool = True) -> dict[str, Any]:
        """Arguments of `apply_grip`, without the ratio.

        Args:
            model: The model.
            seed: Of what is drawn at random.
            fresh: Whether a tower scorer with random weights, which takes as long as a trained one, will do.

        Raises:
            ConfigError: There is no such selector, or the model brings no tower scorer.
            ScorerError: The tower scorer cannot be loaded.
            UnsupportedModelError: The tower is not known.
        """
        if callable(self.selector):
            return {"tower_selector": self.selector, "tower_depth": self.depth}
        name, depth = self.selector or LEARNED, self.depth
        folder = name if os.path.isdir(name) else None
        if name == LEARNED and (own := attached_folder(model)) and os.path.isdir(os.path.join(own, FOLDER)):
            folder = os.path.join(own, FOLDER)
        if folder is not None:
            return {"tower_selector": TowerGripSelector(TowerScorer.from_folder(folder)), "tower_depth": depth}
        if name != LEARNED:
            return {"tower_selector": get_tower_selector(name, seed), "tower_depth": depth}
        if not fresh:
            raise ConfigError("no tower scorer came with the model; name a tower selector, or a tower scorer's folder")
        parts = find_parts(model)
        tower, language = find_tower(parts, depth), model.config.get_text_config()
        torch.manual_seed(seed)
        sizes = {"hidden_size": width_of(tower), "text_size": language.hidden_size, "depth": tower.first}
        config = TowerScorerConfig(**sizes)
        scorer = TowerScorer(config).eval()
        nn.Module.to(scorer, model.device, model.dtype)
        return {"tower_selector": TowerGripSelector(scorer), "tower_depth": depth}


def goes_with_tower(selector: Any) -> bool:
    """Whether a selector of visual tokens works where the vision tower drops rows."""
    try:
        refuse_selector(selector)
    except ConfigError:
        return False
    return callable(selector)


def with_towers(chosen: Mapping[str, Any], tower: TowerChoice, model: Any, seed: int) -> dict[str, Any]:
    """Selectors for an evaluation, and after each that can the same with the vision tower's rows dropped.

    Args:
        chosen: Selectors by name, or several trainings of one.
        tower: Which rows stay.
        model: The model.
        seed: Of what is drawn at random.

    Raises:
        ConfigError, ScorerError, UnsupportedModelError: See `TowerChoice.settings`.
    """
    settings, found = tower.settings(model, seed, fresh=False), {}
    for name, one in chosen.items():
        found[name] = one
        several = list(one) if isinstance(one, Sequence) else [one]
        if all(goes_with_tower(each) for each in several):
            for ratio in tower.ratios:
                both = [Pruned(each, tower_keep_ratio=ratio, **settings) for each in several]
                found[tower_label(name, ratio)] = both
    return found
