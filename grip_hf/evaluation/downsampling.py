"""Image down-sampling: the same number of visual tokens by a smaller picture instead of by choosing.

Shown to beat many pruning methods (VTC-Bench, arXiv 2510.07143), so it belongs beside every one of them. Its kin:
features of the whole picture pooled to as few, and the smaller picture enlarged again, which tells what is left in it.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import check_num_tokens
from ..engine.plan import make_plan, take
from ..engine.upstream import ENCODED, check_takes_encoded
from ..errors import ConfigError, UnsupportedModelError
from ..families.table import Parts, find_parts
from ..families.towers import PREFIX

DOWNSAMPLING, POOLED = "downsampling", "pooled"  # their names among selectors
ENLARGED = "downsampling_enlarged"  # a yardstick: it saves nothing


@torch.no_grad()
def downsample(
    model: Any, inputs: dict[str, Tensor], num_tokens: int, positions: Literal["original", "compact"] = "original"
) -> dict[str, Any]:
    """Inputs of the same prompts with smaller pictures, for the model without a patch.

    Pictures are shrunk to the largest square of at most `num_tokens` patches, and the tower interpolates its position
    embeddings.

    Args:
        model: A model with a tower for square pictures and one visual token per patch (LLaVA), not patched.
        inputs: `input_ids`, `attention_mask` and `pixel_values` of a batch padded on the left.
        num_tokens: Most visual tokens per picture, >= 1.
        positions: "original" gives each token the position of the patch in its middle, "compact" numbers them on.

    Returns:
        Arguments of the model's forward call, or of `generate`; the encoded pictures stand beside them.

    Raises:
        ConfigError: `num_tokens` or `positions` is not allowed.
        UnsupportedModelError: The tower is of another kind, or transformers is older than 5.18.
    """
    parts, side = _square(model, num_tokens, positions)
    pictures = parts.base.get_image_features(  # type: ignore[operator]
        _resized(inputs["pixel_values"], side * _patch(parts)), interpolate_pos_encoding=True, return_dict=True
    )
    return _with_pictures(parts, inputs, pictures, side, positions)


@torch.no_grad()
def pool(
    model: Any, inputs: dict[str, Tensor], num_tokens: int, positions: Literal["original", "compact"] = "original"
) -> dict[str, Any]:
    """Inputs of the same prompts with the tower's features averaged over a coarser grid, before the projector.

    The tower sees the whole picture, so that only the language model has less to do; otherwise as `downsample`.
    """
    parts, side = _square(model, num_tokens, positions)
    full = _full(parts)

    def average(projector: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        features = args[0]
        extra = features.shape[1] - full**2
        grid = features[:, extra:].mT.unflatten(2, (full, full))
        cells = F.adaptive_avg_pool2d(grid.float(), side).flatten(2).mT.to(features.dtype)
        return (torch.cat([features[:, :extra], cells], 1), *args[1:])

    projector: Any = parts.base.multi_modal_projector
    with projector.register_forward_pre_hook(average):
        pictures = parts.base.get_image_features(inputs["pixel_values"], return_dict=True)  # type: ignore[operator]
    return _with_pictures(parts, inputs, pictures, side, positions)


@torch.no_grad()
def enlarge(model: Any, inputs: dict[str, Tensor], num_tokens: int) -> dict[str, Any]:
    """Inputs of the same prompts with pictures shrunk as `downsample` does, and enlarged to their old size.

    All visual tokens are there, so this is no method; it tells how much of the picture a smaller one still holds.
    """
    parts, side = _square(model, num_tokens)
    pixels = inputs["pixel_values"]
    return {**inputs, "pixel_values": _resized(_resized(pixels, side * _patch(parts)), pixels.shape[-1])}


def _square(model: Any, num_tokens: int, positions: str = "original") -> tuple[Parts, int]:
    """The model's parts, and the side of the largest square of at most `num_tokens` patches."""
    parts = check_square(model)
    if positions not in ("original", "compact"):
        raise ConfigError(f"positions must be 'original' or 'compact', got {positions!r}")
    return parts, min(_full(parts), math.isqrt(check_num_tokens(num_tokens)))


def _patch(parts: Parts) -> int:
    """Pixels on a side of a patch."""
    config: Any = parts.base.config
    return int(config.vision_config.patch_size)


def _full(parts: Parts) -> int:
    """Patches on a side of a whole picture."""
    config: Any = parts.base.config
    return int(config.vision_config.image_size) // _patch(parts)


def _resized(pixels: Tensor, size: int) -> Tensor:
    """Pixels [B, C, H, W] of `size` x `size`, in their dtype."""
    return F.interpolate(pixels.float(), (size, size), mode="bilinear", antialias=True).to(pixels.dtype)


def _with_pictures(
    parts: Parts, inputs: dict[str, Tensor], pictures: Any, side: int, positions: str
) -> dict[str, Any]:
    """Prompts with as many placeholders as encoded pictures of side x side patches have tokens."""
    config: Any = parts.base.config
    full, vision = _full(parts), config.vision_config
    extra = PREFIX[vision.model_type] * (config.vision_feature_select_strategy == "full")
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    visual = torch.isin(ids, torch.tensor(parts.token_ids, device=ids.device))
    within = (visual.long().cumsum(1) - 1) % (full**2 + extra)
    plan = make_plan(mask & (~visual | (within < side**2 + extra)))
    where = mask.long().cumsum(1).sub(1).clamp(min=0)
    if positions == "original":
        where = where + torch.where(visual, middle_patches(within - extra, side, full) - (within - extra), 0)
    filler = next(token for token in range(len(parts.token_ids) + 1) if token not in parts.token_ids)
    return {
        "input_ids": take(ids, plan.index).masked_fill(~plan.valid, filler),
        "attention_mask": plan.valid.long(),
        "position_ids": take(where, plan.index)
        if positions == "original"
        else plan.valid.long().cumsum(1).sub(1).clamp(min=0),
        ENCODED: {"image": pictures},
    }


def check_square(model: Any) -> Parts:
    """The parts of a model whose pictures can be shrunk; raises `UnsupportedModelError` for any other."""
    parts = find_parts(model)
    check_takes_encoded(parts.base)
    config: Any = parts.base.config
    vision = config.vision_config
    if config.model_type != "llava" or vision.model_type not in PREFIX:
        raise UnsupportedModelError(
            f"down-sampling needs a LLaVA model with a CLIP or SigLIP tower, this {config.model_type!r} model has a "
            f"tower of type {vision.model_type!r}; models of any resolution take smaller pictures from their processor"
        )
    return parts


def middle_patches(index: Tensor, side: int, full: int) -> Tensor:
    """The patch of a full x full grid in the middle of each cell of a side x side grid; negative ones stay."""
    row, column = index.div(side, rounding_mode="floor"), index % side
    row, column = ((2 * axis + 1) * full // (2 * side) for axis in (row, column))
    return torch.where(index < 0, index, row * full + column)
