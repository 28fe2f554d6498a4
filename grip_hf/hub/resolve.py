"""What the arguments of `apply_grip` ask for: settings, and the scorer if a learned one chooses."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..config import GripConfig
from ..errors import ConfigError, HubError, ScorerError
from ..families.table import Parts
from ..tower.part import FOLDER
from .adapter_part import AdapterPart
from .checkpoint import CONFIG_FILE, SUBFOLDER, attached_folder, came_from
from .download import fetch, is_repo_id, read_settings

LEARNED = "grip"
TRAINING_FREE = "cdpruner"  # the rule by which it was chosen is in the docstring of `apply_grip`
OLD_NAME = "config_or_scorer_or_repo"


@dataclasses.dataclass(frozen=True)
class Resolved:
    """What `apply_grip` was asked for.

    Attributes:
        config: The settings, with the name of the selector; None if a callable chooses.
        scorer: The learned scorer, if it chooses.
        tower_scorer: The one that lies beside it, for the rows of the vision tower, if there is one.
        note: What was decided for the user, for the log and the handle's `repr`; "" if nothing was.
        folder: Where what chooses came from, if it came from a folder.
    """

    config: GripConfig
    scorer: nn.Module | None = None
    note: str = ""
    tower_scorer: nn.Module | None = None
    folder: str | None = None


def resolve(
    parts: Parts,
    config: Any,
    scorer: Any,
    selector: Any,
    overrides: dict[str, Any],
    hub: dict[str, Any],
    adapter: AdapterPart | None = None,
    force: bool = False,
) -> Resolved:
    """The settings and the scorer that the arguments of `apply_grip` ask for.

    Args:
        parts: The model.
        config: A `GripConfig`, or None; also what `old_spelling` takes.
        scorer: A scorer, its folder or Hub id, or None.
        selector: The selector's name, a callable, or None.
        overrides: Settings that override those found.
        hub: Where on the Hub to look: `revision`, `token`, ... (see `fetch`).
        adapter: What the active adapter was trained with, if anything; it comes before the base model's checkpoint.
        force: Take a scorer of another model, with a warning.

    Raises:
        ConfigError: A setting is not allowed, or two that exclude each other are given.
        ScorerError: The scorer is missing, damaged, or made for another model.
        HubError: A repository cannot be read.
    """
    overrides = dict(overrides)
    config = overrides.pop(OLD_NAME, config)
    config, scorer = old_spelling(config, scorer)
    if isinstance(selector, str):
        overrides["selector"] = selector
    elif selector is not None and not callable(selector):
        raise ConfigError(f"selector must be a name or a callable, got {selector!r}")
    GripConfig.check_names(overrides)
    given = overrides.get("selector") or (config.selector if config is not None else None)
    saved: GripConfig | None = None
    folder: str | None = None
    if isinstance(scorer, (str, os.PathLike)):
        asked = scorer
        folder = _folder(parts, scorer, hub, force)
        saved, scorer = _load(folder)
        if scorer is None and saved is None:
            raise ScorerError(f"{os.fspath(asked)!r} holds no GRIP scorer")
    elif scorer is not None and not isinstance(scorer, nn.Module):
        raise ConfigError(f"scorer must be a GripScorer, or the folder or Hub id of one, got {type(scorer).__name__}")
    elif (
        scorer is None
        and given in (None, LEARNED)
        and not callable(selector)
        and not _brings_scorer(config, overrides)
    ):
        saved, scorer, folder = _attached(parts, adapter, given, hub)
    if config is None and saved is None and not overrides:
        raise ConfigError(
            "apply_grip(model) needs a budget: give a GripConfig, keep_ratio=..., num_tokens=... or quality=..., or "
            "the scorer=... whose settings were saved with it; the checkpoint of this model "
            f"({came_from(parts.owner)!r}) has no GRIP part"
        )
    check_scorer(parts, scorer, force)
    folder = folder or getattr(getattr(scorer, "config", None), "_name_or_path", None) or None
    decided = _decided(config, saved, scorer, selector, overrides)
    return dataclasses.replace(decided, tower_scorer=_tower(folder), folder=folder)


def _tower(folder: str | None) -> nn.Module | None:
    """The tower scorer in a scorer's folder, if there is one."""
    if folder is None or not os.path.isdir(os.path.join(folder, FOLDER)):
        return None
    from ..tower.scorer import TowerScorer  # only needed here

    return TowerScorer.from_folder(os.path.join(folder, FOLDER))


def _attached(
    parts: Parts, adapter: AdapterPart | None, given: str | None, hub: dict[str, Any]
) -> tuple[GripConfig | None, nn.Module | None, str | None]:
    """Settings, scorer and folder of what came with the active adapter, or with the model's checkpoint."""
    if adapter is not None and adapter.scorer is None and given is None:
        return adapter.settings, None, adapter.beside()
    attached = attached_folder(parts.owner, **hub)
    if adapter is not None and adapter.scorer is not None:
        attached = adapter.folder(attached)
    return (None, None, None) if attached is None else (*_load(attached), attached)


def old_spelling(config: Any, scorer: Any) -> tuple[GripConfig | None, Any]:
    """The settings and the scorer of a call, whose second argument may be either of them or a repository, as in 0.1.

    Raises:
        ConfigError: It is nothing of this, or the name of a selector.
    """
    if config is not None and not isinstance(config, GripConfig):
        if isinstance(config, Mapping):
            instead = "apply_grip(model, GripConfig(...))"
            config = GripConfig.from_dict(config)
        elif isinstance(config, (str, os.PathLike, nn.Module)) and scorer is None:
            _refuse_name(config)
            instead = "apply_grip(model, scorer=...)"
            config, scorer = None, config
        else:
            raise ConfigError(
                f"expected a GripConfig as the second argument of apply_grip, got {type(config).__name__}: a scorer, "
                "its folder or its Hub id is given by scorer=..."
            )
        warnings.warn(f"this spelling of apply_grip is deprecated: write {instead}", DeprecationWarning, stacklevel=4)
    _refuse_name(scorer)
    return config, scorer


def _refuse_name(source: Any) -> None:
    """Raise `ConfigError` if the name of a selector is given where a scorer is expected."""
    if not isinstance(source, str) or os.path.exists(source):
        return
    from ..selectors import SELECTORS  # imported late, as every selector is

    if source in SELECTORS:
        raise ConfigError(
            f"{source!r} is the name of a selector, not of a scorer's folder or repository: "
            f"write apply_grip(model, keep_ratio=..., selector={source!r})"
        )


def _brings_scorer(config: GripConfig | None, overrides: Mapping[str, Any]) -> bool:
    """Whether the arguments of the selector name a scorer."""
    kwargs = overrides.get("selector_kwargs", config.selector_kwargs if config is not None else None)
    return "scorer" in (kwargs or ())


def _decided(
    config: GripConfig | None, saved: GripConfig | None, scorer: Any, selector: Any, overrides: dict[str, Any]
) -> Resolved:
    """The settings given before those saved, and the selector where none is named."""
    named = config is not None and config.selector is not None
    if config is not None and saved is not None and not named and scorer is None:
        config = config.replace(selector=saved.selector, selector_kwargs=saved.selector_kwargs)
    config = config or saved
    config = GripConfig(**overrides) if config is None else config.replace(**overrides)
    if callable(selector):
        if scorer is not None:
            raise ConfigError("give a scorer or a selector of your own, got both")
        return Resolved(config)
    if scorer is not None:
        if config.selector not in (None, LEARNED):
            raise ConfigError(f"give a scorer or a selector, got a scorer and selector={config.selector!r}")
        return Resolved(config.replace(selector=LEARNED), scorer)
    if config.selector is not None:
        return Resolved(config)
    if "scorer" in config.selector_kwargs:
        return Resolved(config.replace(selector=LEARNED))
    note = f"no scorer was given and none came with the model: {TRAINING_FREE!r}, which needs no training, chooses"
    return Resolved(config.replace(selector=TRAINING_FREE), None, note)


def describe_base(model: nn.Module) -> dict[str, Any]:
    """What a scorer remembers of the model that it was made for: its id on the Hub, if any, and its types."""
    config: Any = model.config
    name = came_from(model)
    return {
        "id": name if is_repo_id(name) else None,
        "model_type": config.model_type,
        "text_model_type": config.get_text_config().model_type,
    }


def _folder(parts: Parts, source: str | os.PathLike[str], hub: dict[str, Any], force: bool = False) -> str:
    """The folder of a saved scorer: here, or downloaded if its settings fit the model."""
    path = os.fspath(source)
    if os.path.isdir(path):
        part = os.path.join(path, SUBFOLDER)
        top = os.path.isfile(os.path.join(path, CONFIG_FILE)) or not os.path.isfile(os.path.join(part, CONFIG_FILE))
        return path if top else part
    if not isinstance(source, str) or not is_repo_id(path):
        raise ScorerError(f"no folder {path!r} to load a grip scorer from, and it is no id of a Hub repository")
    found = fetch(path, check=lambda folder: _check_settings(parts, read_settings(folder, path), force), **hub)
    if found is None:
        raise HubError(f"the repository {path!r} holds no GRIP scorer: it has neither {CONFIG_FILE} nor config.json")
    return str(found)


def _load(folder: str) -> tuple[GripConfig | None, nn.Module | None]:
    """The settings and the scorer saved in a folder; either may be missing."""
    path = os.path.join(folder, CONFIG_FILE)
    config = GripConfig.from_json(path) if os.path.isfile(path) else None
    if config is not None and config.selector not in (None, LEARNED):
        return config, None
    if config is not None and config.selector is None and not os.path.isfile(os.path.join(folder, "config.json")):
        return config, None  # settings alone, of `GripConfig.save_pretrained`
    from ..scorer.model import GripScorer  # only needed here

    return config, GripScorer.from_pretrained(folder)


def check_scorer(parts: Parts, scorer: nn.Module | None, force: bool = False) -> None:
    """Refuse a scorer made for embeddings of another width, for another kind of model, or for another model.

    Args:
        parts: The model.
        scorer: The scorer, or None.
        force: Warn of another model of the same kind and width instead, such as one that was tuned further.

    Raises:
        ScorerError: It is made for another model.
    """
    if scorer is not None:
        config = getattr(scorer, "config", None)
        _check_settings(parts, {name: getattr(config, name, None) for name in ("hidden_size", "base_model")}, force)


def _check_settings(parts: Parts, settings: Mapping[str, Any], force: bool = False) -> None:
    """The same from what `config.json` of a scorer says, before its weights are downloaded; {} is no scorer."""
    if not settings:
        return
    made_for = settings.get("hidden_size")
    width = parts.language_model.config.hidden_size  # type: ignore[union-attr]
    owner = type(parts.owner).__name__
    if made_for != width:
        raise ScorerError(
            f"this scorer is made for hidden_size {made_for}, but the language model of {owner} has {width}"
        )
    base = settings.get("base_model") or {}
    mine = describe_base(parts.owner)
    wrong = [name for name in ("model_type", "text_model_type") if base.get(name, mine[name]) != mine[name]]
    if wrong:
        raise ScorerError(
            f"this scorer is made for {base.get('id') or 'a model'} ({', '.join(f'{n} {base[n]!r}' for n in wrong)}), "
            f"but {owner} has {', '.join(f'{n} {mine[n]!r}' for n in wrong)}"
        )
    if base.get("id") and mine["id"] and base["id"] != mine["id"]:
        apart = f"this scorer was trained for {base['id']!r}, and this model is {mine['id']!r}"
        if not force:
            raise ScorerError(
                f"{apart}, whose visual tokens may mean something else: train one for it, or, if it is the same model "
                "or one tuned from it, say force=True (--force)"
            )
        warnings.warn(f"{apart}: taken since force was given", UserWarning, stacklevel=5)
