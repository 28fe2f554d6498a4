"""Image down-sampling: the same number of visual tokens by a smaller picture instead of by choosing.

Shown to beat many pruning methods (VTC-Bench, arXiv 2510.07143), so it belongs beside every one of them.
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

DOWNSAMPLING = "downsampling"  # its name among selectors


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
    parts = check_square(model)
    config: Any = parts.base.config
    vision = config.vision_config
    if positions not in ("original", "compact"):
        raise ConfigError(f"positions must be 'original' or 'compact', got {positions!r}")
    full = vision.image_size // vision.patch_size
    side = min(full, math.isqrt(check_num_tokens(num_tokens)))
    size = (side * vision.patch_size,) * 2
    pixels = F.interpolate(inputs["pixel_values"].float(), size, mode="bilinear", antialias=True)
    pictures = parts.base.get_image_features(  # type: ignore[operator]
        pixels.to(inputs["pixel_values"].dtype), interpolate_pos_encoding=True, return_dict=True
    )
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
