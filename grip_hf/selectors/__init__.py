"""Ways to choose visual tokens, one short file each, behind one interface."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ..errors import ConfigError
from .base import Selector

SELECTORS: dict[str, type[Selector]] = {}


def register(name: str) -> Callable[[type[Selector]], type[Selector]]:
    """Class decorator that makes a selector known under `name`."""

    def add(cls: type[Selector]) -> type[Selector]:
        if SELECTORS.setdefault(name, cls) is not cls:
            raise ConfigError(f"a selector named {name!r} is registered already: {SELECTORS[name]}")
        cls.name = name
        return cls

    return add


def get_selector(name: str, *, seed: int = 0, **kwargs: Any) -> Selector:
    """Build the selector registered under `name`.

    Raises:
        ConfigError: No selector has this name, or it does not take these arguments.
    """
    if name not in SELECTORS:
        raise ConfigError(f"unknown selector {name!r}; known ones are {sorted(SELECTORS)}")
    cls = SELECTORS[name]
    try:
        inspect.signature(cls).bind(**kwargs)
    except TypeError as error:
        allowed = sorted(inspect.signature(cls).parameters)
        raise ConfigError(f"selector {name!r} takes the arguments {allowed}, got {kwargs}: {error}") from error
    selector = cls(**kwargs)
    selector.seed = seed
    return selector


from . import (  # noqa: E402, F401  (they register themselves)
    cdpruner,
    cls_attention,
    diversity,
    fastv,
    grid,
    grip,
    hiprune,
    mmtok,
    prumerge,
    pyramiddrop,
    random,
    scope,
    similarity,
    sparsevlm,
    visionzip,
    vispruner,
)
