"""What must be known of a vision tower to drop rows between its layers: a table of data, checked when it is used."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from numbers import Integral
from typing import Any

from torch import nn

from ..engine import upstream
from ..errors import ConfigError, UnsupportedModelError
from ..families.table import Parts
from ..families.towers import PREFIX as ATTENDED

# Leading rows that are no patches, by `model_type` of the vision config, of towers that are not packed.
PREFIX = {
    **ATTENDED,
    "janus_vision_model": 0,
    "qianfan_ocr_vision": 1,
    "siglip2_vision_model": 0,
}
DEPTH = 1 / 3  # where rows leave, as a share of the layers, if nothing is said


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which rows a tower has, and which of them make one visual token.

    Attributes:
        module: Name of the tower in the base model.
        packed: True if pictures lie one after the other, [rows, width]; else it is [pictures, rows, width].
        prefix: Leading rows that are no patches ([CLS]); they always stay.
        keep_prefix: Whether they are visual tokens of the language model too.
        merge: Patches on a side of the square that makes one visual token; its rows go or stay together.
        window: Visual tokens on a side of an attention window, if the tower reorders patches by window; else 0.
        reads: Layers between which the tower itself reads hidden states, so that they must have their length there.
        packing: Method of the base model that lays out the tokens of a picture's tiles, if it adds or drops some.
        whole: Encoders of the base model whose pictures pass the tower whole.
    """

    module: str
    packed: bool = False
    prefix: int = 0
    keep_prefix: bool = False
    merge: int = 1
    window: int = 0
    reads: tuple[int, ...] = ()
    packing: str = ""
    whole: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Tower:
    """The tower of one model.

    Attributes:
        rows: Facts.
        module: The tower.
        layers: Its layers, in order.
        first: The first layer that runs without the dropped rows, >= 1.
    """

    rows: Rows
    module: nn.Module
    layers: tuple[nn.Module, ...]
    first: int


def _patches(config: Any, name: str = "vision_tower", **facts: Any) -> Rows:
    return Rows(name, prefix=PREFIX[config.vision_config.model_type], **facts)


def _joined(config: Any) -> Rows:
    return Rows("vision_tower", merge=config.vision_config.hidden_stride)


def _llava(config: Any) -> Rows:
    return _patches(config, keep_prefix=config.vision_feature_select_strategy == "full")


def _tiled(config: Any) -> Rows:
    # Videos are pooled across the borders of patches, so that hardly a token of theirs would be left.
    return _patches(config, packing="pack_image_features", whole=("get_video_features",))


def _shuffled(config: Any) -> Rows:
    return _patches(config, merge=round(1 / config.downsample_ratio))


def _downsampled(config: Any) -> Rows:
    return _patches(config, merge=config.downsample_factor)


def _idefics(config: Any) -> Rows:
    return _patches(config, "vision_model", merge=config.scale_factor)


def _gemma3(config: Any) -> Rows:
    vision = config.vision_config
    return _patches(config, merge=vision.image_size // vision.patch_size // math.isqrt(config.mm_tokens_per_image))


def _packed(config: Any) -> Rows:
    vision = config.vision_config
    window = 0
    if getattr(vision, "fullatt_block_indexes", None):
        window = vision.window_size // vision.spatial_merge_size // vision.patch_size
    reads = tuple(getattr(vision, "deepstack_visual_indexes", None) or ())
    return Rows("visual", packed=True, merge=vision.spatial_merge_size, window=window, reads=reads)


# By `model_type` of the model. Resamplers, which look at all rows (Aria, Idefics2), lose those that are dropped.
ROWS: dict[str, Callable[[Any], Rows]] = {
    "aya_vision": _downsampled,
    "cohere2_vision": _downsampled,
    "deepseek_vl": lambda config: _patches(config, "vision_model"),
    "exaone4_5": _packed,
    "gemma3": _gemma3,
    "glm46v": _packed,
    "glm4v": _packed,
    "glm4v_moe": _packed,
    "glm_ocr": _packed,
    "idefics3": _idefics,
    "internvl": _shuffled,
    "janus": lambda config: _patches(config, "vision_model"),
    "lfm2_vl": _downsampled,
    "llava": _llava,
    "llava_next": _tiled,
    "llava_next_video": _tiled,
    "llava_onevision": _tiled,
    "ovis2": _joined,
    "paligemma": _patches,
    "qianfan_ocr": _shuffled,
    "qwen2_5_vl": _packed,
    "qwen2_vl": _packed,
    "qwen3_5": _packed,
    "qwen3_5_moe": _packed,
    "qwen3_vl": _packed,
    "qwen3_vl_moe": _packed,
    "smolvlm": _idefics,
    "vipllava": _patches,
}
OWN = (_packed, _joined)  # no other tower is ever in their place
# Names of the list of layers, and what a layer must take.
LISTS, PER_ROW = ("layers", "layer", "blocks"), ("cu_seqlens", "position_embeddings")


def find_tower(parts: Parts, depth: float | None = None) -> Tower:
    """The vision tower of a model, and where rows leave it.

    Args:
        parts: The model.
        depth: After how many layers, or after which share of them; None for a third.

    Raises:
        UnsupportedModelError: The tower is not known, or not as it is known.
        ConfigError: It has no such layer.
    """
    config: Any = parts.base.config
    describe = ROWS.get(config.model_type)
    kind = getattr(getattr(config, "vision_config", None), "model_type", None)
    if describe is None or (describe not in OWN and kind not in PREFIX):
        raise UnsupportedModelError(
            f"tower_keep_ratio needs a vision tower whose rows are known; this {config.model_type!r} model has one of "
            f"type {kind!r}. Known are the model types {', '.join(sorted(ROWS))}, with towers of their own or "
            f"of type {', '.join(PREFIX)}"
        )
    rows = describe(config)
    module: Any = getattr(parts.base, rows.module, None)
    lists = [one for name, one in _lists(module) if name in LISTS]
    if len(lists) != 1:
        raise upstream.unknown(
            f"the vision tower {rows.module!r} of {type(parts.base).__name__} has no list of layers"
        )
    layers = tuple(lists[0])
    lacking = [name for name in PER_ROW if name not in upstream.parameters(layers[0])] if rows.packed else []
    if lacking:
        raise upstream.unknown(f"{type(layers[0]).__name__}.forward does not take {lacking}")
    if rows.packing and not hasattr(type(parts.base), rows.packing):
        raise upstream.unknown(f"{type(parts.base).__name__} has no method {rows.packing!r}")
    return Tower(rows, module, layers, first_without(depth, len(layers)))


def find_module(parts: Parts) -> nn.Module | None:
    """The vision tower of a model, or None if it is not known."""
    config: Any = parts.base.config
    describe = ROWS.get(config.model_type)
    kind = getattr(getattr(config, "vision_config", None), "model_type", None)
    known = describe is not None and (describe in OWN or kind in PREFIX)
    return getattr(parts.base, describe(config).module, None) if known and describe is not None else None


def _lists(module: nn.Module | None) -> list[tuple[str, nn.ModuleList]]:
    named = () if module is None else module.named_modules()
    return [(name.rpartition(".")[2], one) for name, one in named if isinstance(one, nn.ModuleList) and len(one)]


def first_without(depth: float | None, layers: int) -> int:
    """The first of so many layers that runs without the dropped rows.

    Raises:
        ConfigError: There is no such layer, or none before it.
    """
    share = DEPTH if depth is None else depth
    first = int(share) if isinstance(share, Integral) else max(1, round(share * layers))
    if not 1 <= first < layers:
        raise ConfigError(
            f"tower_depth must leave at least one of the vision tower's {layers} layers before and one after it, "
            f"got {depth!r}"
        )
    return first


def width_of(tower: Tower) -> int:
    """Width of a tower's rows."""
    linear: Any = next(one for one in _attention(tower).modules() if hasattr(one, "in_features"))
    return int(linear.in_features)


def attends(tower: Tower) -> bool:
    """Whether the tower's attention is known, so that it can be computed beside it."""
    names = ("qkv", "num_heads", "scaling") if tower.rows.packed else ("q_proj", "k_proj", "num_heads", "scale")
    return all(hasattr(_attention(tower), name) for name in names)


def _attention(tower: Tower) -> Any:
    return upstream.attention_module(tower.layers[tower.first - 1])
