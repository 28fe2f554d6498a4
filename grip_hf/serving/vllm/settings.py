"""What a server was asked to do: `--hf-overrides '{"grip": {...}}'`, or the GRIP part of the checkpoint.

vLLM carries the model's config to the front end and to every worker, so the settings live in it, as `config.grip`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from ...config import GripConfig
from ...errors import ConfigError, ScorerError, UnsupportedModelError
from ...families.table import FAMILIES, Parts
from ...hub.checkpoint import attached_folder
from ...hub.resolve import resolve
from ...selectors import get_selector
from ...selectors.base import Selector

NAME = "grip"
SETTLED = "grip_settings"  # where what `settle` found lies in the model's config
OFF = (None, False)
ASKING = ("grip", "similarity", "cdpruner")  # selectors that read the question
SELECTORS = (*ASKING, "diversity", "grid", "random")
REQUEST = ("keep_ratio", "num_tokens")
OTHERS = ("scorer", "revision")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How pictures are pruned.

    Attributes:
        config: budget, scope and selector.
        scorer: folder or Hub id of the learned scorer, or of the checkpoint that carries it; None if there is none.
        revision: of that repository.
        reads_question: True if the choice depends on the question.
    """

    config: GripConfig
    scorer: str | None
    revision: str | None
    reads_question: bool

    def to_dict(self) -> dict[str, Any]:
        """As plain data, to lie in the model's config."""
        return {**dataclasses.asdict(self), "config": self.config.to_dict()}

    @classmethod
    def of(cls, hf_config: Any) -> Settings | None:
        """The settings that `settle` left in a model's config, or None if pictures are not pruned."""
        found = getattr(hf_config, SETTLED, None)
        return None if found is None else cls(**{**found, "config": GripConfig.from_dict(found["config"])})

    @cached_property
    def digest(self) -> str:
        """A fingerprint of all that is the same for every request."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def budget(self, given: Any) -> tuple[float | None, int | None]:
        """The (keep_ratio, num_tokens) of a request.

        Args:
            given: What the request says under the name `grip` of its `mm_processor_kwargs`, or None.

        Raises:
            ConfigError: It says something else than one allowed budget.
        """
        if given is None:
            return self.config.keep_ratio, self.config.num_tokens
        if not isinstance(given, Mapping) or not given or not set(given) <= set(REQUEST):
            raise ConfigError(f"a request may set {NAME} to one of {list(REQUEST)}, got {given!r}")
        config = GripConfig(**given)
        return config.keep_ratio, config.num_tokens

    def selector(self, hf_config: Any) -> Selector:
        """Build what chooses the tokens."""
        kwargs = dict(self.config.selector_kwargs)
        if self.config.selector == NAME and "scorer" not in kwargs:
            own = {"keep_ratio": self.config.keep_ratio, "num_tokens": self.config.num_tokens}
            found = resolve(_parts(hf_config), None, self.scorer, None, own, {"revision": self.revision})
            kwargs["scorer"] = found.scorer
        assert self.config.selector is not None
        return get_selector(self.config.selector, seed=self.config.seed, **kwargs)


def asked(hf_config: Any) -> bool:
    """Whether a user gave settings; a checkpoint may hold some besides."""
    return getattr(hf_config, NAME, None) not in OFF


def settle(hf_config: Any, model: str, revision: str | None) -> Settings | None:
    """Find out what a server was asked to do, check it, and leave it in the model's config.

    Args:
        hf_config: The model's config; `config.grip` is what the user gave, if anything.
        model: Folder or Hub id of the checkpoint.
        revision: Its revision.

    Returns:
        The settings, or None if pictures are not pruned.

    Raises:
        ConfigError: A setting is not allowed, or not served.
        UnsupportedModelError: The family is not known.
        ScorerError: The scorer is missing, damaged, or made for another model.
        HubError: A repository cannot be read.
    """
    given = getattr(hf_config, NAME, {})
    settings = None if given in OFF else _settle(hf_config, given, model, revision)
    setattr(hf_config, SETTLED, None if settings is None else settings.to_dict())
    return settings


def _settle(hf_config: Any, given: Any, model: str, revision: str | None) -> Settings | None:
    given = {"scorer": given} if isinstance(given, str) else given
    if not isinstance(given, Mapping):
        raise ConfigError(f"{NAME} must be an object such as {{'scorer': 'user/scorer'}}, got {given!r}")
    overrides = {name: value for name, value in given.items() if name not in OTHERS}
    scorer, revision = given.get("scorer"), given.get("revision", None if given.get("scorer") else revision)
    chosen = overrides.get("selector")
    if chosen not in (None, *SELECTORS):
        raise ConfigError(f"selector {chosen!r} is not served by vLLM; those that are: {sorted(SELECTORS)}")
    owner = SimpleNamespace(config=SimpleNamespace(_name_or_path=model))
    if scorer is None and chosen in (None, NAME) and attached_folder(owner, revision=revision):
        scorer = model
    if scorer is None and not overrides:
        return None
    found = resolve(_parts(hf_config), None, scorer, None, overrides, {"revision": revision})
    config = found.config
    if config.selector not in SELECTORS:
        raise ConfigError(f"selector {config.selector!r} is not served by vLLM; those that are: {sorted(SELECTORS)}")
    if config.quality is not None:
        raise ConfigError(
            "quality is promised of transformers' generate: give a server keep_ratio or num_tokens; its clients can "
            "look again by themselves (examples/serving/ladder.py)"
        )
    if config.position_ids != "original":
        raise ConfigError(f"position_ids={config.position_ids!r} is not served by vLLM; use 'original'")
    if config.tower_keep_ratio is not None:
        raise ConfigError(f"tower_keep_ratio={config.tower_keep_ratio!r} is not served by vLLM; set it to null")
    if config.selector == NAME and found.scorer is None and "scorer" not in config.selector_kwargs:
        raise ScorerError(
            f"the selector {NAME!r} needs a scorer, and {model!r} carries none: give {{{NAME!r}: {{'scorer': ...}}}}, "
            f"or a selector that needs none, of {sorted(SELECTORS[1:])}"
        )
    aware = getattr(getattr(found.scorer, "config", None), "query_aware", True)
    settings = Settings(config, scorer, revision, config.selector in ASKING and aware)
    settings.selector(hf_config)  # so that its arguments are refused here
    return settings


def _parts(hf_config: Any) -> Parts:
    """The model as `resolve` looks at it, from its config alone."""
    family = FAMILIES.get(hf_config.model_type)
    if family is None:
        raise UnsupportedModelError(f"models of type {hf_config.model_type!r} cannot be pruned")
    named = type((hf_config.architectures or ["the model"])[0], (SimpleNamespace,), {})  # for the text of errors
    owner: Any = named(config=hf_config)
    language_model: Any = SimpleNamespace(config=hf_config.get_text_config())
    return Parts(owner, owner, language_model, family, placeholder_ids(hf_config))


def placeholder_ids(hf_config: Any) -> tuple[int, ...]:
    """The ids of the placeholder tokens of a model."""
    names = FAMILIES[hf_config.model_type].token_ids
    return tuple(token for token in (getattr(hf_config, name, None) for name in names) if isinstance(token, int))
