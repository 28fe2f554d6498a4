"""`apply_grip` and `remove_grip`: prune the visual tokens of a transformers model in place, and undo it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from . import taps
from .architectures import Parts, find_parts, unwrap
from .attached import CONFIG_FILE, attached_folder
from .boundary import Boundary
from .budgets import Budget, current, override
from .cache import CacheState, state_of
from .choose import Score
from .config import GripConfig
from .errors import CacheError, ConfigError, ScorerError, UnsupportedModelError

__all__ = ["GripHandle", "apply_grip", "remove_grip", "taps"]


class GripHandle:
    """The patch of one model, found at `model.grip`.

    Attributes:
        config: the settings.
        selector: scores visual tokens.
        scorer: the learned scorer behind the selector, or None.
    """

    def __init__(self, parts: Parts, config: GripConfig, selector: Score, scorer: nn.Module | None) -> None:
        self.config = config
        self.selector = selector
        self.scorer = scorer
        self._parts = parts
        compact = config.position_ids == "compact"
        self._boundary = Boundary(parts, selector, config.scope == "image", compact, self._budget)
        self._hooks: list[Any] = []

    def __repr__(self) -> str:
        return f"GripHandle({type(self._parts.owner).__name__}, {self.config})"

    def _budget(self) -> Budget:
        return current(self) or Budget(self.config.keep_ratio, self.config.num_tokens)

    def budget(
        self, keep_ratio: float | Sequence[float] | None = None, num_tokens: int | Sequence[int] | None = None
    ) -> AbstractContextManager[None]:
        """Use another budget within a `with` block, in this thread only.

        Args:
            keep_ratio: share of the visual tokens to keep, in (0, 1], or one per sample.
            num_tokens: number of visual tokens to keep, >= 1, or one per sample.

        Raises:
            ConfigError: Not exactly one budget is given, or it is not allowed.
        """
        return override(self, Budget.checked(keep_ratio, num_tokens))

    def disabled(self) -> AbstractContextManager[None]:
        """Keep all visual tokens within a `with` block, in this thread only."""
        return override(self, Budget(everything=True))

    def kept_tokens(self, cache_or_output: Any) -> list[Tensor]:
        """Which visual tokens a call kept: per sample, their indices among the sample's visual tokens, rising.

        Args:
            cache_or_output: the KV cache of the call, or an output that holds it in `past_key_values`.

        Raises:
            CacheError: There is no cache, or it took part in no call with visual tokens.
        """
        return kept_tokens(cache_or_output)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the settings, and the scorer if there is one, to `directory`; no weight of the model is written."""
        os.makedirs(directory, exist_ok=True)
        if self.scorer is not None:
            self.scorer.save_pretrained(directory)  # type: ignore[operator]
        self.config.to_json(os.path.join(directory, CONFIG_FILE))

    def remove(self) -> None:
        """Remove the patch; the model is exactly as before. Doing so twice is harmless."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._parts.owner.__dict__.get("grip") is self:
            del self._parts.owner.grip


def apply_grip(
    model: nn.Module,
    config_or_scorer_or_repo: Any = None,
    *,
    selector: Score | str | None = None,
    **overrides: Any,
) -> nn.Module:
    """Prune the visual tokens of `model` in place: from now on, each call keeps as many as its budget allows.

    Only hooks on this model object are added; its class, weights and signature stay as they are. Applying again
    replaces the patch.

    Args:
        model: a transformers vision-language model for conditional generation, also one wrapped by PEFT.
        config_or_scorer_or_repo: a `GripConfig` (or dict of its settings), a `GripScorer`, or the directory or Hub id
            of a saved scorer. None takes the GRIP part of the checkpoint that the model came from, if any.
        selector: a selector's name, or any callable from `VisualBatch` to scores [G, N]. Overrides the config's.
        **overrides: settings of `GripConfig` to change, such as `keep_ratio=0.25`.

    Returns:
        The same model; its handle is `model.grip`.

    Raises:
        UnsupportedModelError: The model's family is not supported, or cannot give what the selector needs.
        ConfigError: A setting is not allowed.
        ScorerError: The scorer is missing, damaged, or made for another model.
    """
    parts = find_parts(model)
    config, scorer = _resolve(parts, config_or_scorer_or_repo, selector, overrides)
    if config.position_ids == "compact" and parts.family.mrope:
        raise UnsupportedModelError(
            f"position_ids='compact' is not defined for {type(parts.owner).__name__}, whose positions have several "
            "axes; use position_ids='original'"
        )
    _check_scorer(parts, scorer)
    chosen = selector if callable(selector) else _named_selector(config, scorer)
    handle = GripHandle(parts, config, chosen, scorer)
    hooks = list(_prepare(chosen, parts))
    remove_grip(parts.owner)
    handle._hooks = [*hooks, *handle._boundary.attach()]
    parts.owner.grip = handle  # type: ignore[assignment]
    return model


def remove_grip(model: nn.Module) -> nn.Module:
    """Undo `apply_grip`; returns the model. A model without a patch is left alone."""
    handle = unwrap(model).__dict__.get("grip")
    if isinstance(handle, GripHandle):
        handle.remove()
    return model


def kept_tokens(cache_or_output: Any) -> list[Tensor]:
    """See `GripHandle.kept_tokens`."""
    cache = cache_or_output
    if not hasattr(cache, "get_seq_length"):
        cache = cache.get("past_key_values") if isinstance(cache, Mapping) else None
    state: CacheState | None = state_of(cache)
    if state is None:
        raise CacheError(
            f"no kept tokens in {type(cache_or_output).__name__}: give the KV cache of a call with visual tokens, or "
            "an output that holds it (model(..., use_cache=True) or generate(..., return_dict_in_generate=True))"
        )
    visual = state.visual
    held = visual.new_zeros(visual.shape).scatter(1, state.index, state.valid) & visual
    return [keep[seen].nonzero().flatten() for keep, seen in zip(held, visual, strict=True)]


def _resolve(
    parts: Parts, source: Any, selector: Any, overrides: dict[str, Any]
) -> tuple[GripConfig, nn.Module | None]:
    """The settings and the scorer that the arguments of `apply_grip` ask for."""
    if isinstance(selector, str):
        overrides = {**overrides, "selector": selector}
    elif selector is not None and not callable(selector):
        raise ConfigError(f"selector must be a name or a callable, got {selector!r}")
    GripConfig.check_names(overrides)
    source = GripConfig.from_dict(source) if isinstance(source, Mapping) else source
    named = overrides.get("selector", source.selector if isinstance(source, GripConfig) else "grip")
    learned = named == "grip" and not callable(selector)
    attached = attached_folder(parts.owner) if learned else None
    config: GripConfig | None = None
    scorer: nn.Module | None = None
    if source is None and attached is not None:
        config, scorer = _load(attached)
    elif isinstance(source, GripConfig):
        config = source
        if attached is not None and "scorer" not in config.selector_kwargs:
            scorer = _load(attached)[1]
    elif isinstance(source, nn.Module):
        scorer = source
    elif isinstance(source, (str, os.PathLike)):
        config, scorer = _load(source)
    elif source is not None:
        raise ConfigError(
            f"expected a GripConfig, a GripScorer, or the directory or Hub id of one, got {type(source).__name__}"
        )
    elif not overrides:
        raise ConfigError(
            "apply_grip(model) needs a budget: give a GripConfig, a scorer or its directory, or keep_ratio=... or "
            "num_tokens=...; the checkpoint of this model has no GRIP part"
        )
    return (GripConfig(**overrides) if config is None else config.replace(**overrides)), scorer


def _load(source: str | os.PathLike[str]) -> tuple[GripConfig | None, nn.Module | None]:
    """The settings and the scorer saved in a directory or Hub repository; either may be missing."""
    path = os.path.join(source, CONFIG_FILE)
    config = GripConfig.from_json(path) if os.path.isfile(path) else None
    if config is not None and config.selector != "grip":
        return config, None
    from .scorer import GripScorer  # only needed here

    return config, GripScorer.from_pretrained(source)


def _named_selector(config: GripConfig, scorer: nn.Module | None) -> Score:
    """Build the selector that the settings name."""
    from .selectors import get_selector  # imported late: selectors build on this module's level

    kwargs = dict(config.selector_kwargs)
    if config.selector == "grip" and "scorer" not in kwargs:
        if scorer is None:
            raise ScorerError(
                "the selector 'grip' needs a scorer: apply_grip(model, scorer_or_directory, ...); "
                "selectors that need none are named by selector=..., for example selector='grid'"
            )
        kwargs["scorer"] = scorer
    return get_selector(config.selector, seed=config.seed, **kwargs)


def _check_scorer(parts: Parts, scorer: nn.Module | None) -> None:
    """Refuse a scorer made for embeddings of another width."""
    if scorer is None:
        return
    made_for = getattr(getattr(scorer, "config", None), "hidden_size", None)
    width = parts.language_model.config.hidden_size  # type: ignore[union-attr]
    if made_for != width:
        raise ScorerError(
            f"this scorer is made for hidden_size {made_for}, but the language model of "
            f"{type(parts.owner).__name__} has {width}"
        )


def _prepare(selector: Score, parts: Parts) -> Iterable[Any]:
    """Let a selector register its own hooks."""
    prepare = getattr(selector, "prepare", None)
    return prepare(parts.owner) if prepare is not None else ()
