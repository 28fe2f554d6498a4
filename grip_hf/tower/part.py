"""What a patch has to do with the vision tower, whether rows leave it or not."""

from __future__ import annotations

import dataclasses
import os
import threading
from typing import TYPE_CHECKING, Any

from ..config import GripConfig
from ..engine.attaching import attach_tower
from ..engine.budget import Budget
from ..engine.context import asked_of
from .rows import checked, drops_rows

if TYPE_CHECKING:
    from ..engine.choice import Score
    from ..engine.hooks import Boundary
    from .drop import TowerDrops

FOLDER = "tower"  # where the tower scorer lies within the folder of the scorer
_attaching = threading.Lock()


@dataclasses.dataclass(eq=False)
class TowerPart:
    """The part of one patch. Its hooks are registered with the first budget that needs them.

    Attributes:
        boundary: The patch.
        config: Its settings.
        selector: Chooses the rows, if not what the settings name.
        scorer: The tower scorer that lies beside the scorer, if any.
    """

    boundary: Boundary
    config: GripConfig
    selector: Score | None = None
    scorer: Any = None

    def make(self) -> TowerDrops | None:
        """What is to be registered with the patch, or None if its settings let all rows stay; nothing is changed.

        Raises:
            UnsupportedModelError, ConfigError, ScorerError: See `make_tower`.
        """
        return None if self.config.tower_keep_ratio is None else self._make()

    def _make(self) -> TowerDrops:
        from .patch import make_tower  # imported late: most patches drop no rows

        return make_tower(self.boundary, self.config, self.selector, self.scorer)

    def attach(self, drops: TowerDrops | None) -> None:
        """Register the hooks."""
        if drops is not None:
            self.boundary.tower = drops
            attach_tower(self.boundary, drops.hooks(), drops.methods())

    def budget(
        self, keep_ratio: Any, num_tokens: Any, tower_keep_ratio: Any, quality: Any = None, rule: Any = None
    ) -> Budget:
        """The budget that a user gives, beside what holds by now; raises `ConfigError`, see `GripHandle.budget`."""
        now = asked_of(self.boundary)
        if tower_keep_ratio is None:
            asked = Budget.checked(keep_ratio, num_tokens, quality, rule)
            return dataclasses.replace(asked, tower_keep_ratio=now.tower_keep_ratio)
        if keep_ratio is None and num_tokens is None and quality is None:
            keep_ratio, num_tokens, quality, rule = now.keep_ratio, now.num_tokens, now.quality, rule or now.rule
        return checked(keep_ratio, num_tokens, tower_keep_ratio, quality, rule)

    def dropping(self, budget: Budget) -> TowerDrops | None:
        """What drops rows under a budget, registered or not; None if none go. Raises as `make` does."""
        return (self.boundary.tower or self._make()) if drops_rows(budget) else None

    def ready(self, budget: Budget) -> None:
        """Register the hooks that a budget needs, if they are not."""
        with _attaching:
            if drops_rows(budget) and self.boundary.tower is None:
                self.attach(self._make())

    @property
    def chosen_by(self) -> Score | None:
        """What chooses the rows, if it is more than a name in the settings says."""
        if self.selector is None and self.scorer is not None and self.config.tower_selector in (None, "grip"):
            from .scorer import TowerGripSelector

            return TowerGripSelector(self.scorer)
        return self.selector

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the tower scorer, if there is one, into the folder of the scorer."""
        if self.scorer is not None:
            self.scorer.save_pretrained(os.path.join(folder, FOLDER))


def tower_scorer_of(selector: Any) -> Any:
    """The tower scorer that a selector of rows is no more than, or None."""
    if selector is None or isinstance(selector, str):
        return None
    from .scorer import TowerGripSelector

    return selector.scorer if type(selector) is TowerGripSelector else None
