"""`apply_grip` and `remove_grip`: prune the visual tokens of a transformers model in place, and undo it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from .config import GripConfig
from .engine.attaching import attach, patch_of
from .engine.choice import Score, drops_inside
from .engine.layers import check_layers
from .engine.upstream import check_language_model, is_untested
from .errors import ScorerError, UnsupportedModelError
from .families.table import Parts, find_parts, unwrap
from .handle import GripHandle
from .hub.adapter_part import part_of
from .hub.resolve import LEARNED, resolve
from .quality.promise import Calibration, find
from .tower.part import tower_scorer_of

if TYPE_CHECKING:
    from .scorer.model import GripScorer

__all__ = ["GripHandle", "apply_grip", "remove_grip"]
M = TypeVar("M", bound=nn.Module)
TowerRows = tuple[Score | None, nn.Module | None]  # a callable that chooses them; the tower scorer beside the scorer
logger = logging.getLogger(__name__)


def apply_grip(
    model: M,
    config: GripConfig | None = None,
    *,
    scorer: GripScorer | str | os.PathLike[str] | None = None,
    selector: Score | str | None = None,
    tower_selector: Score | str | None = None,
    calibration: Calibration | str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force: bool = False,
    **overrides: Any,
) -> M:
    """Prune the visual tokens of `model` in place: from now on, each call keeps as many as its budget allows.

    Only hooks on this model object are added; its class, weights and signature stay as they are. Applying again
    replaces the patch.

    Who chooses the tokens: the `selector`, where one is named; else the `scorer`, or what the active adapter was
    trained with, or the scorer that came with the checkpoint of the model; else `cdpruner`, which is logged and told
    by `repr(model.grip)`. It is the method with the best mean over the budgets in the table of
    `grip_hf/evaluation/README.md` of the published ones that need no training, prune before the language model, and
    need nothing of the vision tower, so that it works with every family. It is never taken in place of a scorer that
    was asked for.

    Args:
        model: A transformers vision-language model for conditional generation, also one wrapped by PEFT.
        config: The settings. None takes those saved with the scorer, or makes them of the overrides. A scorer, its
            folder or its Hub id in this place is deprecated.
        scorer: A `GripScorer`, or the folder or Hub id of what `model.grip.save_pretrained` wrote.
        selector: A selector's name, or any callable from `VisualBatch` to scores [G, N]. Overrides the config's.
        tower_selector: The same for the rows of the vision tower, where `tower_keep_ratio` drops some (see
            `grip_hf.tower.selectors`). A `TowerGripSelector` is saved with the patch.
        calibration: What is promised of the answers, or the folder of its `quality.json`; None takes the one beside
            the scorer, if there is one. It is needed for `quality=...`.
        revision: Branch, tag or commit of the Hub repository to read.
        token: Access token for the Hub; None takes the stored one.
        cache_dir: Another cache for downloads than the usual one.
        local_files_only: Take what is in the cache; do not ask the Hub.
        force: Take a scorer that was trained for another model of the same kind and width, with a warning.
        **overrides: Settings of `GripConfig` to change, such as `keep_ratio=0.25`.

    Returns:
        The same model; its handle is `model.grip`.

    Raises:
        UnsupportedModelError: The model's family is not supported, or cannot give what the selector needs; or the
            installed transformers is newer than the newest tested, and a self-check of this family fails.
        ConfigError: A setting is not allowed, or a scorer is given beside another selector.
        ScorerError: The scorer is missing, damaged, or made for another model.
        HubError: The Hub repository cannot be read, or holds something else than JSON and safetensors.
    """
    parts = _whole(find_parts(model))
    hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    adapter = part_of(model)
    learned = tower_scorer_of(tower_selector)
    if isinstance(tower_selector, str) or learned is not None:
        overrides["tower_selector"] = tower_selector if learned is None else LEARNED
    asked = resolve(parts, config, scorer, selector, overrides, hub, adapter, force)
    settings = asked.config
    if settings.position_ids == "compact" and parts.family.mrope:
        raise UnsupportedModelError(
            f"position_ids='compact' is not defined for {type(parts.owner).__name__}, whose positions have several "
            "axes; use position_ids='original'"
        )
    chosen = selector if callable(selector) else _named_selector(settings, asked.scorer)
    own = tower_selector if callable(tower_selector) and learned is None else None
    rows = (own, learned or asked.tower_scorer)
    promised = find(calibration, asked.folder, settings.quality is not None)
    if settings.quality is not None:
        _handle(parts, settings, chosen, asked.scorer, rows, promised).promise(settings.quality)
    if promised is not None and drops_inside(chosen):
        if settings.quality is not None:
            raise UnsupportedModelError(
                f"quality is not defined for selectors that drop tokens within the language model, got {chosen!r}"
            )
        promised = None
    check_language_model(parts.language_model)
    if drops_inside(chosen):
        check_layers(parts.language_model, chosen)
    if is_untested():
        from .doctor.guard import vouch  # imported late: only then are tiny models needed

        vouch(parts.owner.config, prune)
    handle = _attach(parts, settings, chosen, asked.scorer, asked.note, rows, promised)
    if adapter is not None:
        handle._adapter_files.compare_part(adapter)
    return model


def prune(model: nn.Module, selector: Score, keep_ratio: float) -> GripHandle:
    """`apply_grip` without the self-check, for the self-check."""
    return _attach(find_parts(model), GripConfig(keep_ratio=keep_ratio), selector, None)


def _handle(
    parts: Parts,
    config: GripConfig,
    selector: Score,
    scorer: nn.Module | None,
    rows: TowerRows,
    calibration: Calibration | None,
) -> GripHandle:
    """A patch that is not on the model yet; `rows` says what chooses those of the vision tower."""
    handle = GripHandle(parts, config, selector, scorer, calibration)
    handle.tower.selector, handle.tower.scorer = rows
    return handle


def _attach(
    parts: Parts,
    config: GripConfig,
    selector: Score,
    scorer: nn.Module | None,
    note: str = "",
    rows: TowerRows = (None, None),
    calibration: Calibration | None = None,
) -> GripHandle:
    """Put the patch on the model, in the place of an earlier one."""
    handle = _handle(parts, config, selector, scorer, rows, calibration)
    drops = handle.tower.make()
    handle.adapters.update(getattr(vars(parts.owner).get("grip"), "adapters", {}))
    hooks = list(_prepare(selector, parts))
    # From here on nothing raises, so that a model that cannot be patched keeps what patch it had.
    remove_grip(parts.owner)
    attach(handle._boundary, hooks)
    handle.tower.attach(drops)
    for method in (*handle._savers, *handle._looks):
        method.attach()
    if note:
        handle.note = note
        logger.warning("%s", note)
    parts.owner.grip = handle  # type: ignore[assignment]
    return handle


def remove_grip(model: M) -> M:
    """Undo `apply_grip`; returns the model. A model without a patch is left alone."""
    owner = unwrap(model)
    for module in owner.modules() if isinstance(owner, nn.Module) else ():
        for handle in (module.__dict__.get("grip"), getattr(patch_of(module), "key", None)):
            if isinstance(handle, GripHandle):
                handle.remove()
    return model


def _whole(parts: Parts) -> Parts:
    """The parts of the model to patch: where a patched model's base model was given, those of the model around it."""
    patch = patch_of(parts.base)
    around = patch is not None and patch.parts.owner is not parts.owner and parts.owner is parts.base
    return patch.parts if patch is not None and around else parts


def _named_selector(config: GripConfig, scorer: nn.Module | None) -> Score:
    """Build the selector that the settings name."""
    from .selectors import get_selector  # imported late: selectors build on this module's level

    assert config.selector is not None
    kwargs = dict(config.selector_kwargs)
    if config.selector == "grip" and "scorer" not in kwargs:
        if scorer is None:
            raise ScorerError(
                "the selector 'grip' needs a scorer: apply_grip(model, scorer=...) with one, its folder or Hub id; "
                "selectors that need none are named by selector=..., for example selector='grid'"
            )
        kwargs["scorer"] = scorer
    return get_selector(config.selector, seed=config.seed, **kwargs)


def _prepare(selector: Score, parts: Parts) -> Iterable[Any]:
    """Let a selector register its own hooks."""
    prepare = getattr(selector, "prepare", None)
    return prepare(parts.owner) if prepare is not None else ()
