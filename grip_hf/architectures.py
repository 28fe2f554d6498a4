"""Facts about each family of vision-language models: `model_type` -> `Family`. A table of data, not of code."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import layout
from .errors import UnsupportedModelError


@dataclasses.dataclass(frozen=True)
class Scene:
    """One call as the layout of a family sees it.

    Attributes:
        visual: [B, L] bool, the visual tokens.
        input_ids: [B, L] long, or None if the caller gave embeddings.
        embeds: [B, L, D] what enters the language model.
        position_ids: as given to the language model, last dims [B or 1, L], or None.
        base: the multimodal base model.
    """

    visual: Tensor
    input_ids: Tensor | None
    embeds: Tensor
    position_ids: Tensor | None
    base: nn.Module

    @property
    def config(self) -> Any:
        """The config of the base model."""
        return self.base.config


Layout = Callable[[Scene], tuple[Tensor, Tensor]]


def _square(config: Any) -> int:
    """Patches of one square picture of the vision tower."""
    sizes = config.vision_config.image_size, config.vision_config.patch_size
    image, patch = (size[0] if isinstance(size, (list, tuple)) else size for size in sizes)
    return (image // patch) ** 2


def fixed_grid(scene: Scene) -> tuple[Tensor, Tensor]:
    """Every image has the same square number of tokens, perhaps with a leading [CLS]."""
    config = scene.config
    tokens = _square(config) + (getattr(config, "vision_feature_select_strategy", "default") == "full")
    order = layout.ordinals(scene.visual)
    return order.div(tokens, rounding_mode="floor"), layout.grid_positions(order % tokens, tokens)


def tiles_in_run(scene: Scene) -> tuple[Tensor, Tensor]:
    """One unbroken run per image, cut into square tiles of equal size (InternVL)."""
    config = scene.config
    tokens = int(_square(config) * config.downsample_ratio**2)
    within = layout.within_run(scene.visual) % tokens
    return layout.run_index(scene.visual), layout.grid_positions(within, tokens)


def marked_tiles(scene: Scene) -> tuple[Tensor, Tensor]:
    """One unbroken run per tile, each after a marker token such as <row_1_col_2> (Idefics3, SmolVLM).

    A new image starts at a marker that the image at hand has already had. Without token ids each tile is an image.
    """
    config = scene.config
    tokens = _square(config) // config.scale_factor**2
    run, within = layout.run_index(scene.visual), layout.within_run(scene.visual)
    image = run
    if scene.input_ids is not None:
        markers = torch.nn.functional.pad(scene.input_ids, (1, -1), value=-1)
        starts = scene.visual & (within == 0)
        first_runs = torch.zeros_like(starts)
        for row, columns in enumerate(starts):
            seen: set[int] = set()
            for column in columns.nonzero().flatten().tolist():
                marker = int(markers[row, column])
                if marker in seen or not seen:
                    first_runs[row, column] = True
                    seen = set()
                seen.add(marker)
        image = first_runs.long().cumsum(1) - 1
    return image, layout.grid_positions(within % tokens, tokens)


def newline_rows(scene: Scene) -> tuple[Tensor, Tensor]:
    """A base picture, then a grid whose rows end with a learned newline embedding (LLaVA-NeXT, LLaVA-OneVision)."""
    newline: Tensor = scene.base.image_newline  # type: ignore[assignment]
    ends = (scene.embeds == newline.to(scene.embeds)).all(-1) & scene.visual
    return layout.newline_coordinates(scene.visual, ends, _square(scene.config))


def rotary_grid(scene: Scene) -> tuple[Tensor, Tensor]:
    """Rows and columns are the last two kinds of M-RoPE positions (Qwen2-VL and its relatives).

    Within a run, a picture keeps its temporal position and a video moves it on: a change starts a new image only at
    picture tokens.
    """
    positions = scene.position_ids
    if positions is None or positions.ndim < 3:
        within = layout.within_run(scene.visual)
        return layout.run_index(scene.visual), layout.scaled_positions(
            torch.stack([within, torch.zeros_like(within)], -1), layout.run_index(scene.visual), scene.visual
        )
    time, rows, columns = positions[-3:].expand(3, *scene.visual.shape)
    if scene.input_ids is not None:
        time = time.masked_fill(scene.input_ids == getattr(scene.config, "video_token_id", -1), 0)
    image = layout.changes(time, scene.visual)
    return image, layout.scaled_positions(torch.stack([rows, columns], -1), image, scene.visual)


@dataclasses.dataclass(frozen=True)
class Family:
    """What the patch must know about one family.

    Attributes:
        layout: gives (image [B, L] long, positions [B, L, 2] float) of the visual tokens of a call.
        language_model: attribute of the base model that is the language model.
        token_ids: config attributes that hold the ids of the placeholder tokens of pictures and videos.
        mrope: True if positions have several kinds, so that they cannot be made compact.
    """

    layout: Layout
    language_model: str = "language_model"
    token_ids: tuple[str, ...] = ("image_token_id",)
    mrope: bool = False


IMAGE_AND_VIDEO = ("image_token_id", "video_token_id")

FAMILIES: dict[str, Family] = {
    "llava": Family(fixed_grid),
    "llava_next": Family(newline_rows),
    "llava_onevision": Family(newline_rows, token_ids=IMAGE_AND_VIDEO),
    "qwen2_vl": Family(rotary_grid, token_ids=IMAGE_AND_VIDEO, mrope=True),
    "qwen2_5_vl": Family(rotary_grid, token_ids=IMAGE_AND_VIDEO, mrope=True),
    "internvl": Family(tiles_in_run),
    "smolvlm": Family(marked_tiles, language_model="text_model"),
    "idefics3": Family(marked_tiles, language_model="text_model"),
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
