"""What chooses the visual tokens of a model that is observed, and the rows of its vision tower."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..config import GripConfig
from ..engine.choice import drops_inside
from ..errors import UnsupportedModelError
from ..patch import apply_grip, remove_grip


@dataclasses.dataclass(frozen=True)
class Chooser:
    """Arguments of `apply_grip`, whose budget does not count.

    Attributes:
        scorer: A scorer, its folder or Hub id.
        selector: A selector, or its name.
        force: Take a scorer that was trained for another model.
        config: Settings.
        tower: More arguments: those for the vision tower.
    """

    scorer: Any = None
    selector: Any = None
    force: bool = False
    config: GripConfig | None = None
    tower: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def apply(self, model: Any) -> Any:
        """Patch a model, whatever its budget; returns its handle.

        Raises:
            UnsupportedModelError: The selector drops tokens within the language model.
        """
        chosen = {"scorer": self.scorer, "selector": self.selector, "force": self.force, **self.tower}
        apply_grip(model, self.config, num_tokens=1, **chosen)
        if drops_inside(model.grip.selector):
            name = model.grip.config.selector
            remove_grip(model)
            raise UnsupportedModelError(f"a quality is not defined for {name!r}, which drops tokens between layers")
        return model.grip

    @classmethod
    def of(cls, handle: Any, force: bool = False) -> Chooser:
        """What chooses in a patch, so that nothing is loaded again."""
        own = handle.config.selector is None  # a function of the user's
        rows = {"tower_selector": handle.tower.chosen_by}
        return cls(handle.scorer, handle.selector if own else None, force, handle.config, rows)
