"""What the arguments of `apply_grip` ask for: settings, and the scorer if a learned one chooses."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..config import GripConfig
from ..errors import ConfigError, HubError, ScorerError
from ..families.table import Parts
from .checkpoint import CONFIG_FILE, SUBFOLDER, attached_folder, came_from
from .download import fetch, is_repo_id, read_settings

Resolved = tuple[GripConfig, nn.Module | None]


def resolve(parts: Parts, source: Any, selector: Any, overrides: dict[str, Any], hub: dict[str, Any]) -> Resolved:
    """The settings and the scorer that the arguments of `apply_grip` ask for.

    Args:
        parts: The model.
        source: `config_or_scorer_or_repo`.
        selector: The selector's name, a callable, or None.
        overrides: Settings that override those found.
        hub: Where on the Hub to look: `revision`, `token`, ... (see `fetch`).

    Raises:
        ConfigError: A setting is not allowed.
        ScorerError: The scorer is missing, damaged, or made for another model.
        HubError: A repository cannot be read.
    """
    if isinstance(selector, str):
        overrides = {**overrides, "selector": selector}
    elif selector is not None and not callable(selector):
        raise ConfigError(f"selector must be a name or a callable, got {selector!r}")
    GripConfig.check_names(overrides)
    source = GripConfig.from_dict(source) if isinstance(source, Mapping) else source
    named = overrides.get("selector", source.selector if isinstance(source, GripConfig) else "grip")
    learned = named == "grip" and not callable(selector)
    config: GripConfig | None = None
    scorer: nn.Module | None = None
    if source is None and learned:
        attached = attached_folder(parts.owner, **hub)
        if attached is not None:
            config, scorer = _load(attached)
    elif isinstance(source, GripConfig):
        config = source
        if learned and "scorer" not in config.selector_kwargs:
            attached = attached_folder(parts.owner, **hub)
            scorer = None if attached is None else _load(attached)[1]
    elif isinstance(source, nn.Module):
        scorer = source
    elif isinstance(source, (str, os.PathLike)):
        config, scorer = _load(_folder(parts, source, hub))
    elif source is not None:
        raise ConfigError(
            f"expected a GripConfig, a GripScorer, or the directory or Hub id of one, got {type(source).__name__}"
        )
    if source is None and config is None and not overrides:
        raise ConfigError(
            "apply_grip(model) needs a budget: give a GripConfig, a scorer or its directory, or keep_ratio=... or "
            f"num_tokens=...; the checkpoint of this model ({came_from(parts.owner)!r}) has no GRIP part"
        )
    _check_scorer(parts, scorer)
    return (GripConfig(**overrides) if config is None else config.replace(**overrides)), scorer


def describe_base(model: nn.Module) -> dict[str, Any]:
    """What a scorer remembers of the model that it was made for: its id on the Hub, if any, and its types."""
    config: Any = model.config
    name = came_from(model)
    return {
        "id": name if is_repo_id(name) else None,
        "model_type": config.model_type,
        "text_model_type": config.get_text_config().model_type,
    }


def _folder(parts: Parts, source: str | os.PathLike[str], hub: dict[str, Any]) -> str:
    """The folder of a saved scorer: here, or downloaded if its settings fit the model."""
    path = os.fspath(source)
    if os.path.isdir(path):
        part = os.path.join(path, SUBFOLDER)
        top = os.path.isfile(os.path.join(path, CONFIG_FILE)) or not os.path.isfile(os.path.join(part, CONFIG_FILE))
        return path if top else part
    if not isinstance(source, str) or not is_repo_id(path):
        raise ScorerError(f"no folder {path!r} to load a grip scorer from, and it is no id of a Hub repository")
    found = fetch(path, check=lambda folder: _check_settings(parts, read_settings(folder, path)), **hub)
    if found is None:
        raise HubError(f"the repository {path!r} holds no GRIP scorer: it has neither {CONFIG_FILE} nor config.json")
    return str(found)


def _load(folder: str) -> tuple[GripConfig | None, nn.Module | None]:
    """The settings and the scorer saved in a folder; either may be missing."""
    path = os.path.join(folder, CONFIG_FILE)
    config = GripConfig.from_json(path) if os.path.isfile(path) else None
    if config is not None and config.selector != "grip":
        return config, None
    from ..scorer.model import GripScorer  # only needed here

    return config, GripScorer.from_pretrained(folder)


def _check_scorer(parts: Parts, scorer: nn.Module | None) -> None:
    """Refuse a scorer made for embeddings of another width, or for another kind of model."""
    if scorer is not None:
        config = getattr(scorer, "config", None)
        _check_settings(parts, {name: getattr(config, name, None) for name in ("hidden_size", "base_model")})


def _check_settings(parts: Parts, settings: Mapping[str, Any]) -> None:
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
