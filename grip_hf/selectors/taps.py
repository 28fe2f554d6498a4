"""Attention inside the vision tower, computed beside it from one layer's queries and keys.

The tower keeps the user's attention kernel: a hook on one attention module projects that layer's input once more and
attends in float32. For [CLS] this is one query, for the mean over all queries one attention map, in chunks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..engine.taps import publish
from ..errors import UnsupportedModelError
from ..families.table import find_parts
from ..families.towers import PREFIX, TOWERS, Tower, remember_grid

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


FEATURES = "vision.features"  # what the projector gets, one row per visual token

# A layer by its index, by its depth as a share of all, or (None) the one whose output the language model gets.
Layer = int | float | None


def tap_name(feature: str, layer: Layer) -> str:
    """Name of the tap that holds a feature of a layer."""
    return f"vision.{feature}" if layer is None else f"vision.{feature}.{layer}"


@dataclasses.dataclass(frozen=True)
class AttentionTap:
    """The hook of one attention module; a class, so that a patched model can be copied and pickled.

    Attributes:
        tower: Facts of the tower.
        features: Names of features (see `Attended`).
        layer: The layer, as the selector named it.
    """

    tower: Tower
    features: tuple[str, ...]
    layer: Layer

    @torch.no_grad()
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Publish the features of this call."""
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        attended = self.tower.attended(self.tower, module, hidden, kwargs)
        for feature in self.features:

            def rows(feature: str = feature) -> Tensor:
                return attended.per_token(getattr(attended, feature)())

            publish(tap_name(feature, self.layer), hidden, rows)


def tap_vision(model: nn.Module, who: str, features: Sequence[str], layer: Layer = None) -> list[RemovableHandle]:
    """Publish features of one attention layer of the vision tower whenever it runs.

    Args:
        model: The model to hook.
        who: Name of the selector, for the error message.
        features: Names of features (see `Attended`); the taps are called by `tap_name`.
        layer: Which layer.

    Returns:
        The handles of the hooks.

    Raises:
        UnsupportedModelError: The tower is of an unknown kind, its patches cannot be told from the visual tokens, or
            it has no such layer.
    """
    module, modules, tower = find_tower(model, who)
    index = tower.layer if layer is None else layer
    index = int(index * len(modules)) if isinstance(index, float) else index
    if not -len(modules) <= index < len(modules):
        raise UnsupportedModelError(f"layer must be in [-{len(modules)}, {len(modules)}) for this tower, got {layer}")
    handles = [modules[index].register_forward_hook(AttentionTap(tower, tuple(features), layer), with_kwargs=True)]
    if tower.window:
        handles.append(module.register_forward_pre_hook(remember_grid, with_kwargs=True))
    return handles


def find_tower(model: nn.Module, who: str) -> tuple[nn.Module, list[nn.Module], Tower]:
    """The vision tower, its attention modules in order, and its facts in this model.

    Raises:
        UnsupportedModelError: The tower is of an unknown kind, or its patches cannot be told from the visual tokens.
    """
    parts = find_parts(model)
    config: Any = parts.base.config
    describe = TOWERS.get(config.model_type)
    kind = config.vision_config.model_type
    if describe is None or kind not in PREFIX:
        raise UnsupportedModelError(
            f"selector {who!r} needs attention of the vision tower, which is known for the model types "
            f"{', '.join(TOWERS)} with towers of type {', '.join(PREFIX)}; this {config.model_type!r} model has a "
            f"tower of type {kind!r}"
        )
    tower = describe(config)
    module: Any = getattr(parts.base, tower.module)
    modules = [one for one in module.modules() if hasattr(one, "qkv") or hasattr(one, "q_proj")]
    return module, modules, tower


def tap_features(model: nn.Module) -> list[RemovableHandle]:
    """Publish what the projector gets as `FEATURES`, if it is known to make one visual token of each patch."""
    base: Any = find_parts(model).base
    describe = TOWERS.get(base.config.model_type)
    if describe is None or describe(base.config).merge > 1 or not hasattr(base, "multi_modal_projector"):
        return []
    return [base.multi_modal_projector.register_forward_pre_hook(publish_features)]


def publish_features(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Hook of the projector: publish what it gets, one row per visual token."""
    publish(FEATURES, args[0], lambda: args[0].detach().flatten(0, 1))
