"""The settings of a patch: how many visual tokens stay, and who chooses them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any, Literal

from packaging.version import InvalidVersion, Version

from .errors import ConfigError, HubError
from .version import __version__

CONFIG_VERSION = "1.0"
CONFIG_FILE = "grip_config.json"
LIBRARY = "grip_hf_version"  # beside the settings in a saved config: which release of the library wrote it
SCOPES = ("sample", "image")
POSITION_IDS = ("original", "compact")
# `tower_keep_ratio="auto"`: never less than the first, and so many times the share of visual tokens.
AUTO, TOWER_LEAST, TOWER_TIMES = "auto", 0.75, 3.0


def check_keep_ratio(value: object, name: str = "keep_ratio") -> float:
    """Return `value` as a float in (0, 1], or raise `ConfigError`."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) <= 1:
        raise ConfigError(f"{name} must be a number in (0, 1], got {value!r}")
    return float(value)


def check_tower(value: object) -> float | str | None:
    """Return `value` as a float in (0, 1], "auto" or None, or raise `ConfigError`."""
    return value if value is None or value == AUTO else check_keep_ratio(value, "tower_keep_ratio")


def tower_ratio_for(keep_ratio: float) -> float:
    """Share of the vision tower's rows that goes with a share of the visual tokens (see `grip_hf/tower/README.md`)."""
    return min(1.0, max(TOWER_LEAST, TOWER_TIMES * keep_ratio))


def check_tower_ratio(tower_keep_ratio: float | str | None, keep_ratio: float) -> None:
    """Raise `ConfigError` if the vision tower is to keep less than the language model."""
    if isinstance(tower_keep_ratio, float) and tower_keep_ratio < keep_ratio:
        raise ConfigError(
            f"tower_keep_ratio must not be below keep_ratio, which needs as many rows of the vision tower: got "
            f"tower_keep_ratio={tower_keep_ratio!r}, keep_ratio={keep_ratio!r}"
        )


def check_tower_depth(value: object) -> int | float:
    """Return `value` as an int >= 1 or a float in (0, 1), or raise `ConfigError`."""
    whole = isinstance(value, Integral) and int(value) >= 1
    share = isinstance(value, Real) and not isinstance(value, Integral) and 0 < float(value) < 1
    if isinstance(value, bool) or not (whole or share):
        raise ConfigError(f"tower_depth must be a number of layers >= 1 or a share of them in (0, 1), got {value!r}")
    return int(value) if isinstance(value, Integral) else float(value)  # type: ignore[arg-type]


def check_num_tokens(value: object) -> int:
    """Return `value` as an int >= 1, or raise `ConfigError`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        raise ConfigError(f"num_tokens must be an integer >= 1, got {value!r}")
    return int(value)


def check_quality(value: object) -> float:
    """Return `value` as a float in (0, 1), both ends excluded, or raise `ConfigError`."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < 1:
        raise ConfigError(f"quality must be a number in (0, 1), such as 0.99, got {value!r}")
    return float(value)


def check_one_budget(keep_ratio: object, num_tokens: object, quality: object = None) -> None:
    """Raise `ConfigError` unless exactly one of the budgets is given."""
    if sum(one is not None for one in (keep_ratio, num_tokens, quality)) != 1:
        raise ConfigError(
            f"give exactly one of keep_ratio and num_tokens (or quality), got keep_ratio={keep_ratio!r}, "
            f"num_tokens={num_tokens!r}, quality={quality!r}"
        )


def count_kept(total: int, keep_ratio: float | None = None, num_tokens: int | None = None) -> int:
    """Number of tokens kept out of `total` under one budget: at least 1, never more than `total`."""
    if total <= 0:
        return 0
    if num_tokens is not None:
        return min(num_tokens, total)
    assert keep_ratio is not None
    return min(total, max(1, math.floor(keep_ratio * total + 0.5)))


@dataclasses.dataclass(frozen=True)
class GripConfig:
    """How many visual tokens are kept, chosen by whom, and with which positions.

    A budget is for the visual tokens of one call of the model: pictures of a later turn have one of their own, and so
    have those of each chunk of a chunked prefill.

    Args:
        keep_ratio: Share of the visual tokens to keep, in (0, 1]. Give exactly one of it and `num_tokens`.
        num_tokens: Number of visual tokens to keep, >= 1. A sample with fewer keeps all of them.
        scope: `"sample"` shares the budget over all images of a sample; `"image"` gives each image its own.
        selector: Name of the selector that scores the tokens. None leaves it to `apply_grip`: "grip" where there is a
            scorer, else a method that needs no training.
        selector_kwargs: Keyword arguments of that selector; must be JSON-able to be saved.
        position_ids: `"original"` keeps the positions of the unpruned sequence, with gaps; `"compact"` re-numbers.
        tower_keep_ratio: Share of the vision tower's patch rows that stay after some of its layers, in (0, 1], and not
            below `keep_ratio`; "auto" takes what goes with the budget of the visual tokens; None for all of them.
        tower_depth: After how many of the tower's layers, >= 1, or after which share of them, in (0, 1), the others
            leave; None for a third.
        tower_selector: Name of what chooses them (see `grip_hf.tower.selectors`). None leaves it to `apply_grip`: the
            scorer's own tower scorer where there is one, else a method that needs no training.
        seed: Seed for selectors that draw at random.
        version: Version of this format.
        quality: In place of a ratio or a number: the share of answers of `generate` that are to be as with all tokens,
            in (0, 1), at as few tokens as a calibration of `grip-hf calibrate` found to be enough.

    Raises:
        ConfigError: A value is not allowed; the message names the setting, the value and what is allowed.
    """

    keep_ratio: float | None = None
    num_tokens: int | None = None
    scope: Literal["sample", "image"] = "sample"
    selector: str | None = None
    selector_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    position_ids: Literal["original", "compact"] = "original"
    tower_keep_ratio: float | str | None = None
    tower_depth: int | float | None = None
    tower_selector: str | None = None
    seed: int = 0
    version: str = CONFIG_VERSION
    quality: float | None = None

    def __post_init__(self) -> None:
        check_one_budget(self.keep_ratio, self.num_tokens, self.quality)
        if self.quality is not None:
            object.__setattr__(self, "quality", check_quality(self.quality))
        if self.keep_ratio is not None:
            object.__setattr__(self, "keep_ratio", check_keep_ratio(self.keep_ratio))
        if self.num_tokens is not None:
            object.__setattr__(self, "num_tokens", check_num_tokens(self.num_tokens))
        if self.scope not in SCOPES:
            raise ConfigError(f"scope must be one of {SCOPES}, got {self.scope!r}")
        if self.position_ids not in POSITION_IDS:
            raise ConfigError(f"position_ids must be one of {POSITION_IDS}, got {self.position_ids!r}")
        for name in ("selector", "tower_selector"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ConfigError(f"{name} must be the name of a selector or None, got {value!r}")
        if self.tower_keep_ratio is not None:
            object.__setattr__(self, "tower_keep_ratio", check_tower(self.tower_keep_ratio))
            check_tower_ratio(self.tower_keep_ratio, self.keep_ratio or 0)
        if self.tower_depth is not None:
            object.__setattr__(self, "tower_depth", check_tower_depth(self.tower_depth))
        if not isinstance(self.selector_kwargs, Mapping) or not all(isinstance(k, str) for k in self.selector_kwargs):
            raise ConfigError(f"selector_kwargs must be a dict with string keys, got {self.selector_kwargs!r}")
        object.__setattr__(self, "selector_kwargs", dict(self.selector_kwargs))
        if isinstance(self.seed, bool) or not isinstance(self.seed, Integral) or not 0 <= int(self.seed) < 2**63:
            raise ConfigError(f"seed must be an integer in [0, 2**63), got {self.seed!r}")
        object.__setattr__(self, "seed", int(self.seed))
        if not isinstance(self.version, str):
            raise ConfigError(f"version must be a string, got {self.version!r}")

    def __hash__(self) -> int:
        """Equal settings have equal hashes; of `selector_kwargs`, which may hold lists, the names alone count."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return hash(tuple({**values, "selector_kwargs": frozenset(self.selector_kwargs)}.values()))

    def num_kept(self, total: int) -> int:
        """Number of tokens kept of `total` real ones (0 when there are none).

        Raises:
            ConfigError: The budget is a quality: how many stay differs from answer to answer.
        """
        if self.quality is not None:
            raise ConfigError(f"quality={self.quality} keeps no fixed number of tokens")
        return count_kept(total, self.keep_ratio, self.num_tokens)

    def replace(self, **overrides: Any) -> GripConfig:
        """Return a copy with some settings changed; giving one kind of budget drops the other."""
        self.check_names(overrides)
        budgets = ("keep_ratio", "num_tokens", "quality")
        if any(overrides.get(name) is not None for name in budgets):
            overrides = {**dict.fromkeys(budgets), **overrides}
        return dataclasses.replace(self, **overrides)

    @classmethod
    def check_names(cls, settings: Iterable[str]) -> None:
        """Raise `ConfigError` if a name is not that of a setting."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ConfigError(f"unknown settings {unknown}; known ones are {sorted(known)}")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a plain dict, and which release of the library wrote it."""
        settings = dataclasses.asdict(self)
        if self.quality is None:
            del settings["quality"]  # releases that do not know it would warn
        return {**settings, LIBRARY: __version__}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GripConfig:
        """Build a config from a dict; settings that a newer release added are left out with a warning."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"a GRIP config must be a dict, got {type(data).__name__}: {data!r}")
        data = dict(data)
        _warn_if_newer(data.pop(LIBRARY, None))
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(str(key) for key in set(data) - known)
        if unknown:
            warnings.warn(
                f"ignoring unknown settings {unknown} of a GRIP config of version {data.get('version')!r} "
                f"(this library knows version {CONFIG_VERSION!r}); upgrade grip-hf to use them",
                UserWarning,
                stacklevel=2,
            )
        return cls(**{key: value for key, value in data.items() if key in known})

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the settings as JSON text; write it to `path` too if given."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        if path is not None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> GripConfig:
        """Build a config from JSON text (which starts with `{`) or from the path of a JSON file."""
        text = str(source)
        if not text.lstrip().startswith("{"):
            with open(source, encoding="utf-8") as file:
                text = file.read()
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise ConfigError(f"not a JSON document: {error}") from error

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the settings alone to `grip_config.json` in a folder, which is made if it is missing."""
        os.makedirs(directory, exist_ok=True)
        self.to_json(os.path.join(directory, CONFIG_FILE))

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], *, subfolder: str = "", **hub: Any) -> GripConfig:
        """Read the settings that were saved in a folder or in a repository on the Hub.

        Args:
            name: The folder, or the id of the repository.
            subfolder: Where in it they lie; `"grip"` in a pruned checkpoint.
            **hub: `revision`, `token`, `cache_dir`, `local_files_only`, as huggingface_hub takes them.

        Raises:
            ConfigError: The folder holds no settings, or a setting is not allowed.
            HubError: The Hub does not give them.
        """
        folder = os.fspath(name)
        path = os.path.join(folder, subfolder, CONFIG_FILE)
        if os.path.isdir(folder):
            if not os.path.isfile(path):
                raise ConfigError(f"{os.path.dirname(path)!r} holds no {CONFIG_FILE}")
            return cls.from_json(path)
        from huggingface_hub import hf_hub_download  # imported late: most configs are made in code

        try:
            path = hf_hub_download(folder, CONFIG_FILE, subfolder=subfolder or None, **hub)
        except (OSError, ValueError) as error:
            raise HubError(
                f"no folder {folder!r}, and the Hub gives no {CONFIG_FILE} of that name: {error}"
            ) from error
        return cls.from_json(path)


def _warn_if_newer(wrote: object) -> None:
    """Warn if a release of the library after this one wrote a config."""
    if wrote is None:
        return
    try:
        newer = Version(str(wrote)) > Version(__version__)
    except InvalidVersion:
        warnings.warn(f"{LIBRARY}={wrote!r} of a GRIP config: {wrote!r} is no version", UserWarning, stacklevel=4)
        return
    if newer:
        warnings.warn(
            f"this GRIP config was written by grip-hf {wrote}, and this is {__version__}: what it means may have "
            "changed; upgrade grip-hf to be sure",
            UserWarning,
            stacklevel=4,
        )
