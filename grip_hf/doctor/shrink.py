"""A tiny config of a given model's own type and text backbone, from its config.

Pictures and the vision tower stay those of the family's tiny model, since their sizes must fit each other. What
decides how the language model is called is taken over: its type, kinds of layers, sliding windows and flags.
"""

from __future__ import annotations

import itertools
from typing import Any

from transformers import PreTrainedConfig

from .tiny import TINY, VARIANTS, is_present
from .tiny_core import SLIDING, TEXT


def make_tiny(config: Any) -> Any:
    """A tiny config of the same type and text backbone.

    Args:
        config: The config of a model of a supported family.

    Raises:
        Exception: Whatever transformers raises if it does not take the tiny settings for this text backbone.
    """
    text, tiny = config.get_text_config(), TINY[family_of(config)].config()
    template = tiny.get_text_config()
    name = next(name for name, value in vars(tiny).items() if value is template)
    if template.model_type != text.model_type:
        template = _elsewhere(str(text.model_type))
    setattr(tiny, name, type(text)(**shrink(text, template)))
    return tiny


def family_of(config: Any) -> str:
    """The family in `TINY` of a model's config: of the same type, and of the same text backbone if there is one."""
    name, text = str(config.model_type), config.get_text_config().model_type
    ours = [family for family in TINY if VARIANTS.get(family, family) == name]
    same = (family for family in ours if TINY[family].config().get_text_config().model_type == text)
    return ours[0] if len(ours) == 1 else next(same, ours[0])


def shrink(text: Any, template: Any) -> dict[str, Any]:
    """Settings of a tiny text config: numbers of `template` (None: the usual ones), the rest of `text`."""
    own = _settings(text)
    tiny = {**TEXT, "head_dim": 8, **SLIDING} if template is None else _settings(template)
    layers = max(tiny["num_hidden_layers"], *(len(kinds) for kinds in _kinds(own).values()), 2)
    settings = {name: _small(value, tiny, name) for name, value in own.items()}
    for name, kinds in _kinds(own).items():
        same = tiny["num_hidden_layers"] == layers and set(tiny.get(name) or ()) == set(kinds)
        settings[name] = tiny[name] if same else list(itertools.islice(itertools.cycle(kinds), layers))
    if own.get("sliding_window"):
        settings["sliding_window"] = SLIDING["sliding_window"]
    return {**settings, **{name: tiny[name] for name in TEXT if name in own}, "num_hidden_layers": layers}


def _small(value: Any, tiny: dict[str, Any], name: str) -> Any:
    """One setting: flags and names stay; numbers and what holds numbers become those of the tiny config."""
    if value is None or isinstance(value, (bool, str)) or name not in tiny:
        return value
    return tiny[name]


def _kinds(own: dict[str, Any]) -> dict[str, list[str]]:
    """The different kinds of layers, in order, of each setting that names one per layer."""
    per_layer = {
        name: value
        for name, value in own.items()
        if isinstance(value, (list, tuple)) and value and all(isinstance(one, str) for one in value)
    }
    return {
        name: list(dict.fromkeys(value)) for name, value in per_layer.items() if len(value) == own["num_hidden_layers"]
    }


def _settings(config: Any) -> dict[str, Any]:
    """The settings that this kind of config has beyond those of every config."""
    general = {*PreTrainedConfig().to_dict(), "model_type", "use_cache"}
    return {name: value for name, value in config.to_dict().items() if name not in general and name[0] != "_"}


def _elsewhere(kind: str) -> Any:
    """The text config of this type in the tiny model of another family, or None."""
    configs = (one.config().get_text_config() for family, one in TINY.items() if is_present(family))
    return next((config for config in configs if config.model_type == kind), None)
