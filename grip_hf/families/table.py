"""Facts about each family of vision-language models: `model_type` -> `Family`. A table of data, not of code."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

from torch import nn

from ..errors import UnsupportedModelError
from .layouts import Layout, fixed_grid, frames, latents, line, rotary_grid
from .tiles import (
    joined_rows,
    joined_tiles,
    marked_tiles,
    newline_rows,
    started_rows,
    started_tiles,
    tiles_in_run,
)


def _side(size: Any) -> int:
    return size[0] if isinstance(size, (list, tuple)) else size


def square(config: Any) -> int:
    """Patches of one picture of the vision tower."""
    return (_side(config.vision_config.image_size) // _side(config.vision_config.patch_size)) ** 2


def square_and_cls(config: Any) -> int:
    """Patches of one picture, and its [CLS] token if the config keeps it."""
    return square(config) + (getattr(config, "vision_feature_select_strategy", "default") == "full")


def pooled(config: Any, name: str) -> int:
    """Patches of one picture, `config.name` x `config.name` of which make one token."""
    return int(square(config) // getattr(config, name) ** 2)


def strided(config: Any) -> int:
    """Patches of one picture of a tower that joins them as its config's `hidden_stride` says."""
    return int(square(config) // config.vision_config.hidden_stride**2)


def convolved(config: Any) -> int:
    """Patches of one picture after two convolutions of stride 2."""
    return square(config) // 16


def unfixed(config: Any) -> int:
    """The size of a picture that the config does not fix."""
    return 0


def shuffled(config: Any) -> int:
    """Patches of one tile after a pixel shuffle."""
    return int(square(config) * config.downsample_ratio**2)


def reference_features(config: Any) -> int:
    """Patches of one tile of a timm tower, pooled; 0 if its config does not tell."""
    rows, columns = (config.vision_config.model_args or {}).get("ref_feat_shape", (0, 0))
    return rows * columns // config.projector_pooling_ratio**2


@dataclasses.dataclass(frozen=True)
class Family:
    """What the patch must know about one family.

    Attributes:
        layout: gives (image [B, L] long, positions [B, L, 2] float) of the visual tokens of a call.
        tile: gives the number of tokens of one picture or tile from the config, where it is fixed; it can be pickled.
        language_model: attribute of the base model that is the language model.
        token_ids: config attributes that hold the ids of the placeholder tokens of pictures and videos.
        mrope: True if positions have several kinds, so that they cannot be made compact.
    """

    layout: Layout
    tile: Callable[[Any], int] = unfixed
    language_model: str = "language_model"
    token_ids: tuple[str, ...] = ("image_token_id",)
    mrope: bool = False


BOTH = ("image_token_id", "video_token_id")

FAMILIES: dict[str, Family] = {
    "aria": Family(latents),
    "aya_vision": Family(marked_tiles, partial(pooled, name="downsample_factor")),
    "cohere2_vision": Family(joined_tiles, partial(pooled, name="downsample_factor")),
    "deepseek_vl": Family(fixed_grid, square),
    "ernie4_5_vl_moe": Family(rotary_grid, token_ids=BOTH, mrope=True),
    "exaone4_5": Family(line, token_ids=BOTH),
    "fast_vlm": Family(fixed_grid, attrgetter("image_seq_length")),
    "gemma3": Family(tiles_in_run, attrgetter("mm_tokens_per_image")),
    "gemma3n": Family(tiles_in_run, attrgetter("vision_soft_tokens_per_image")),
    "gemma4": Family(line, token_ids=BOTH),
    "glm46v": Family(rotary_grid, token_ids=BOTH, mrope=True),
    "glm4v": Family(rotary_grid, token_ids=BOTH, mrope=True),
    "glm4v_moe": Family(rotary_grid, token_ids=BOTH, mrope=True),
    "glm_ocr": Family(rotary_grid, token_ids=BOTH, mrope=True),
    "got_ocr2": Family(tiles_in_run, convolved),
    "idefics2": Family(latents, language_model="text_model"),
    "idefics3": Family(marked_tiles, partial(pooled, name="scale_factor"), language_model="text_model"),
    "internvl": Family(tiles_in_run, shuffled),
    "janus": Family(fixed_grid, square),
    "lfm2_vl": Family(line),
    "lighton_ocr": Family(line),
    "llava": Family(fixed_grid, square_and_cls),
    "llava_next": Family(newline_rows, square),
    "llava_next_video": Family(newline_rows, square, token_ids=BOTH),
    "llava_onevision": Family(newline_rows, square, token_ids=BOTH),
    "mistral3": Family(joined_rows),
    "molmo2": Family(started_rows),
    "ovis2": Family(started_tiles, strided),
    "paligemma": Family(fixed_grid, square),
    "perception_lm": Family(tiles_in_run, reference_features, token_ids=BOTH),
    "qianfan_ocr": Family(tiles_in_run, shuffled),
    "qwen2_5_vl": Family(rotary_grid, token_ids=BOTH, mrope=True),
    "qwen2_vl": Family(rotary_grid, token_ids=BOTH, mrope=True),
    "qwen3_5": Family(rotary_grid, token_ids=BOTH, mrope=True),
    "qwen3_5_moe": Family(rotary_grid, token_ids=BOTH, mrope=True),
    "qwen3_vl": Family(rotary_grid, token_ids=BOTH, mrope=True),
    "qwen3_vl_moe": Family(rotary_grid, token_ids=BOTH, mrope=True),
    "smolvlm": Family(marked_tiles, partial(pooled, name="scale_factor"), language_model="text_model"),
    "video_llama_3": Family(line, token_ids=BOTH),
    "video_llava": Family(frames, square_and_cls, token_ids=BOTH),
    "vipllava": Family(fixed_grid, square),
}


@dataclasses.dataclass(frozen=True)
class Parts:
    """The modules that the patch touches.

    Attributes:
        owner: the transformers model that the user holds (adapters unwrapped); carries the `grip` attribute.
        base: the multimodal base model, which merges visual tokens and text.
        language_model: the text decoder that `base` calls.
        family: the facts of this family.
        token_ids: ids of the placeholder tokens.
    """

    owner: nn.Module
    base: nn.Module
    language_model: nn.Module
    family: Family
    token_ids: tuple[int, ...]


def unwrap(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find_parts(model: Any) -> Parts:
    """Find the modules to patch.

    Raises:
        UnsupportedModelError: The model is not of a supported family; the message names those that are.
    """
    supported = f"supported model types: {', '.join(sorted(FAMILIES))}"
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected a vision-language model, got {type(model).__name__}; {supported}")
    owner = unwrap(model)
    model_type = getattr(getattr(owner, "config", None), "model_type", None)
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise UnsupportedModelError(f"{type(owner).__name__} (type {model_type!r}) is not supported; {supported}")
    base = owner if hasattr(owner, family.language_model) else getattr(owner, "model", None)
    language_model = getattr(base, family.language_model, None)
    if not isinstance(base, nn.Module) or not isinstance(language_model, nn.Module):
        raise UnsupportedModelError(
            f"{type(owner).__name__} (type {model_type!r}) has no module {family.language_model!r}; "
            "pass the model class for conditional generation"
        )
    ids = (getattr(base.config, name, None) for name in family.token_ids)
    token_ids = tuple(token for token in ids if isinstance(token, int))
    if not token_ids:
        raise UnsupportedModelError(f"the config of {type(owner).__name__} names no token id in {family.token_ids}")
    return Parts(owner, base, language_model, family, token_ids)
