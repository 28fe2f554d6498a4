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

from ..architectures import find_parts
from ..errors import UnsupportedModelError
from ..taps import publish

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


@dataclasses.dataclass(frozen=True)
class Tower:
    """What the tap must know about one kind of vision tower.

    Attributes:
        prefix: Number of leading tokens that are no patches; with 1 it is a [CLS] token.
    """

    prefix: int


# `model_type` of the vision config -> facts.
TOWERS = {"clip_vision_model": Tower(prefix=1), "siglip_vision_model": Tower(prefix=0)}
# Families whose language model gets one visual token per patch, in the order of the patches.
ONE_TO_ONE = ("llava",)
CHUNK = 512
# A layer by its index, by its depth as a share of all, or (None) the one whose output the language model gets.
Layer = int | float | None


@dataclasses.dataclass(frozen=True)
class Attended:
    """Queries and keys of one layer of the tower.

    Attributes:
        module: The attention module.
        hidden: [B, S, D] its input.
        tower: Facts of the tower.
        keep_prefix: Whether the prefix tokens are visual tokens of the language model too.
    """

    module: Any
    hidden: Tensor
    tower: Tower
    keep_prefix: bool

    def keys(self) -> Tensor:
        """[B, S, D] keys, heads side by side."""
        return self.module.k_proj(self.hidden)

    def mean_keys(self) -> Tensor:
        """[B, S, D / heads] keys, averaged over heads."""
        return self.keys().unflatten(-1, (self.module.num_heads, -1)).mean(-2)

    def salience(self) -> Tensor:
        """[B, S] attention that each token gets: from [CLS] if there is one, else from all tokens on average."""
        return self._received(self.hidden[:, :1] if self.tower.prefix else self.hidden)

    def attention(self) -> Tensor:
        """[B, S] attention that each token gets from all tokens on average."""
        return self._received(self.hidden)

    def _received(self, asking: Tensor) -> Tensor:
        query = self.module.q_proj(asking)
        return attention_received(query, self.keys(), self.module.num_heads, self.module.scale)

    def per_token(self, values: Tensor) -> Tensor:
        """[B, S, ...] -> [visual tokens, ...], in the order in which the language model gets them."""
        return (values if self.keep_prefix else values[:, self.tower.prefix :]).flatten(0, 1)


def attention_received(query: Tensor, key: Tensor, heads: int, scale: float) -> Tensor:
    """Mean over queries and heads of softmax attention: query [B, Q, D], key [B, S, D] -> [B, S] float32."""
    query, key = (t.float().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key))
    total = query.new_zeros(len(key), key.shape[2])
    for chunk in query.split(CHUNK, dim=2):
        total += (chunk @ key.transpose(2, 3) * scale).softmax(-1).sum(dim=(1, 2))
    return total / (heads * query.shape[2])


def tap_name(feature: str, layer: Layer) -> str:
    """Name of the tap that holds a feature of a layer."""
    return f"vision.{feature}" if layer is None else f"vision.{feature}.{layer}"


@dataclasses.dataclass(frozen=True)
class AttentionTap:
    """The hook of one attention module; a class, so that a patched model can be copied and pickled.

    Attributes:
        tower: Facts of the tower.
        keep_prefix: Whether its prefix tokens are visual tokens.
        features: Names of methods of `Attended`.
        layer: The layer, as the selector named it.
    """

    tower: Tower
    keep_prefix: bool
    features: tuple[str, ...]
    layer: Layer

    @torch.no_grad()
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Publish the features of this call."""
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        attended = Attended(module, hidden, self.tower, self.keep_prefix)
        # Two selectors may tap the same feature of the same model: the first hook to run publishes it for both.
        published = hidden.__dict__.setdefault("grip_published", set())
        for feature in self.features:
            name = tap_name(feature, self.layer)
            if name not in published:
                published.add(name)
                publish(name, attended.per_token(getattr(attended, feature)()))


def tap_vision(model: nn.Module, who: str, features: Sequence[str], layer: Layer = None) -> list[RemovableHandle]:
    """Publish features of one attention layer of the vision tower whenever it runs.

    Args:
        model: The model to hook.
        who: Name of the selector, for the error message.
        features: Names of methods of `Attended`; the taps are called by `tap_name`.
        layer: Which layer.

    Returns:
        The handle of the hook.

    Raises:
        UnsupportedModelError: The tower is of an unknown kind, its patches are not the visual tokens, or it has no
            such layer.
    """
    modules, tower, config = find_tower(model, who)
    if layer is None:
        index = feature_layer(config, len(modules))
    else:
        index = int(layer * len(modules)) if isinstance(layer, float) else layer
    if not -len(modules) <= index < len(modules):
        raise UnsupportedModelError(f"layer must be in [-{len(modules)}, {len(modules)}) for this tower, got {layer}")
    tap = AttentionTap(tower, config.vision_feature_select_strategy == "full", tuple(features), layer)
    return [modules[index].register_forward_hook(tap, with_kwargs=True)]


def find_tower(model: nn.Module, who: str) -> tuple[list[nn.Module], Tower, Any]:
    """The attention modules of the vision tower in order, the facts of the tower, and the model's config.

    Raises:
        UnsupportedModelError: The tower is of an unknown kind, or its patches are not the visual tokens.
    """
    parts = find_parts(model)
    config: Any = parts.base.config
    kind, family = config.vision_config.model_type, config.model_type
    if kind not in TOWERS or family not in ONE_TO_ONE:
        raise UnsupportedModelError(
            f"selector {who!r} needs a vision tower of type {' or '.join(TOWERS)} that gives one visual token per "
            f"patch (model types {', '.join(ONE_TO_ONE)}); this {family!r} model has a tower of type {kind!r}"
        )
    tower: Any = parts.base.vision_tower
    modules = [module for module in tower.modules() if hasattr(module, "q_proj") and hasattr(module, "k_proj")]
    return modules, TOWERS[kind], config


def feature_layer(config: Any, layers: int) -> int:
    """Index of the last of `layers` layers whose output enters the projector.

    The config counts the hidden states between layers, of which the first is the input of the first layer.
    """
    chosen = config.vision_feature_layer
    chosen = [chosen] if isinstance(chosen, int) else chosen
    return max(index - 1 if index >= 0 else layers + index for index in chosen)
