"""The scorer that a run starts from: a fresh one, or one that was trained before."""

from __future__ import annotations

from typing import Any

from ..errors import ScorerError
from ..families.table import Parts
from ..hub.checkpoint import attached_folder
from ..hub.resolve import check_scorer
from ..scorer.model import GripScorer, GripScorerConfig

OWN = "grip"  # the scorer that a model came with, as in an evaluation


def first_scorer(
    start: str | None, sizes: dict[str, Any], width: int, base: dict[str, Any], parts: Parts
) -> GripScorer:
    """Make the scorer that is trained.

    Args:
        start: Folder or Hub id of a scorer to go on from, "grip" for the one that the model came with, or None.
        sizes: Of the scorer, as `GripScorerConfig` names them. A scorer to go on from brings its own; a memory may be
            added to it.
        width: Of the model's embeddings.
        base: The model that it is made for.
        parts: The model.

    Raises:
        ScorerError: There is no scorer, it is made for another model, or it has other sizes.
    """
    if start is None:
        return GripScorer(GripScorerConfig(hidden_size=width, base_model=base, **sizes))
    folder = attached_folder(parts.owner) if start == OWN else start
    if folder is None:
        raise ScorerError(f"no scorer came with this model, so there is no {OWN!r} to go on from; give a folder")
    given = GripScorer.from_pretrained(folder)
    check_scorer(parts, given)
    added = {name: value for name, value in sizes.items() if getattr(given.config, name) != value}
    if set(added) - {"memory_width"} or (added and given.config.memory_width):
        own = {name: getattr(given.config, name) for name in added}
        raise ScorerError(f"the scorer {start!r} to go on from has sizes of its own: {own}, got {added}")
    if not added:
        return given
    scorer = GripScorer(GripScorerConfig.from_dict({**given.config.to_dict(), **added}))
    lacking, unknown = scorer.load_state_dict(given.state_dict(), strict=False)
    assert not unknown and all(name.startswith("memory.") for name in lacking)
    return scorer
