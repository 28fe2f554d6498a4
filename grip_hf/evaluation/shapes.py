"""Models with random weights in the shapes of real ones: enough to measure time and memory, nothing to download."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from ..errors import ConfigError
from ..families.table import find_parts


@dataclasses.dataclass(frozen=True)
class Shape:
    """How to build one model and its inputs.

    Attributes:
        family: `model_type` of the model.
        text: Settings of the language model.
        vision: Settings of the vision tower.
        tokens: Visual tokens of one picture.
        words: Text tokens of the prompt.
        extra: Further settings of the model.
    """

    family: str
    text: dict[str, Any]
    vision: dict[str, Any]
    tokens: int
    words: int = 40
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


def _text(
    kind: str, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
    }


def _clip(hidden: int, layers: int, heads: int, image: int = 336, patch: int = 14) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": image,
        "patch_size": patch,
    }


_VICUNA_7B = _text("llama", 4096, 11008, 32, 32, 32, 32064)
_CLIP_L = _clip(1024, 24, 16)

SHAPES = {
    "tiny": Shape("llava", _text("llama", 64, 128, 2, 4, 4, 128), _clip(32, 2, 2, 56), 16),
    # The models in grip_hf/pocket, and their questions.
    "pocket": Shape("llava", _text("llama", 192, 576, 4, 6, 6, 159), _clip(160, 5, 5, 192, 16), 144, words=8),
    "pocket2": Shape("llava", _text("llama", 256, 768, 6, 8, 8, 162), _clip(256, 6, 8, 256, 16), 256, words=8),
    "small": Shape("llava", _text("llama", 1024, 2816, 12, 16, 16, 32064), _clip(512, 8, 8), 576),
    "llava-1.5-7b": Shape("llava", _VICUNA_7B, _CLIP_L, 576),
    # A 672 x 672 picture: the whole and 2 x 2 tiles, each row of which ends with a newline token.
    "llava-next": Shape("llava_next", _VICUNA_7B, _CLIP_L, 5 * 576 + 48, extra={"image_grid_pinpoints": [[672, 672]]}),
    # A 672 x 672 picture: 48 x 48 patches, of which 2 x 2 make one token.
    "qwen2.5-vl-7b": Shape(
        "qwen2_5_vl",
        {
            **_text("qwen2_5_vl_text", 3584, 18944, 28, 28, 4, 152064),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        {
            "model_type": "qwen2_5_vl_vision",
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
        },
        576,
    ),
}


def get_shape(name: str) -> Shape:
    """The shape called `name`; raises `ConfigError` if there is none."""
    if name not in SHAPES:
        raise ConfigError(f"unknown model shape {name!r}; known ones are {', '.join(SHAPES)}")
    return SHAPES[name]


def build_shape(shape: Shape, device: str, dtype: torch.dtype, attention: str = "sdpa", seed: int = 0) -> Any:
    """Build a model of this shape with random weights, in eval mode.

    Raises:
        ConfigError: transformers has no such attention, or not for this model or machine.
    """
    image_token = shape.text["vocab_size"] - 1
    config = AutoConfig.for_model(
        shape.family,
        text_config=shape.text,
        vision_config=shape.vision,
        image_token_id=image_token,
        video_token_id=image_token - 1,
        vision_start_token_id=image_token - 2,
        **shape.extra,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        try:
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"attention {attention!r} cannot be used: {error}") from error
    return model.eval()


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is timed.

    Attributes:
        name: What tables call it.
        model: The model.
        inputs: Inputs of its forward call, the same prompt in each row.
        tokens: Visual tokens of one row.
    """

    name: str
    model: Any
    inputs: dict[str, Tensor]
    tokens: int


def shaped(name: str, batch: int, device: str, dtype: torch.dtype, attention: str, seed: int) -> Subject:
    """A model with random weights in the shape called `name`; raises `ConfigError` if there is none."""
    shape = get_shape(name)
    model = build_shape(shape, device, dtype, attention, seed)
    return Subject(name, model, build_inputs(shape, model, batch, seed), shape.tokens)


def loaded(name: str, model: Any, processor: Any, picture: Any, prompt: str, batch: int) -> Subject:
    """A model of one's own with a picture and a prompt, as its chat template writes them.

    Args:
        name: What tables call it.
        model: The model.
        processor: Its processor.
        picture: A PIL picture.
        prompt: The question.
        batch: Rows.

    Raises:
        ConfigError: The processor cannot take it, or makes no visual tokens of it.
    """
    content = [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]
    return prompted(name, model, processor, [{"role": "user", "content": content}], batch)


def prompted(name: str, model: Any, processor: Any, messages: list[dict[str, Any]], batch: int = 1) -> Subject:
    """A model of one's own with a conversation that asks about pictures; raises as `loaded` does."""
    try:
        inputs = processor.apply_chat_template(
            [messages] * batch,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    except Exception as error:
        raise ConfigError(
            f"the processor of {name} cannot take the prompt: {type(error).__name__}: {error}"
        ) from error
    ids = torch.tensor(find_parts(model).token_ids)
    tokens = int(torch.isin(inputs["input_ids"][0], ids).sum())
    if not tokens:
        raise ConfigError(f"the processor of {name} makes no visual tokens of the picture")
    device = model.get_input_embeddings().weight.device
    ready = {key: value.to(device) for key, value in inputs.items()}
    for key in ready:
        if ready[key].is_floating_point():
            ready[key] = ready[key].to(model.dtype)
    return Subject(name, model, ready, tokens)


def build_inputs(shape: Shape, model: Any, batch: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of `batch` samples: some words, one random picture, a question."""
    rng = torch.Generator().manual_seed(seed)
    image_token = shape.text["vocab_size"] - 1
    words = torch.randint(3, shape.text["vocab_size"] - 3, (batch, shape.words), generator=rng)
    picture = torch.full((batch, shape.tokens), image_token)
    before, after = words.split([shape.words // 5, shape.words - shape.words // 5], 1)
    ids = torch.cat([before, picture, after], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if shape.family == "qwen2_5_vl":
        side = 2 * round(shape.tokens**0.5)
        inputs["pixel_values"] = torch.randn(batch * side * side, 3 * 2 * 14 * 14, generator=rng)
        inputs["image_grid_thw"] = torch.tensor([[1, side, side]] * batch)
        inputs["mm_token_type_ids"] = (ids == image_token).int()
    else:
        size = shape.vision["image_size"]
        tiles = (5,) if shape.family == "llava_next" else ()
        inputs["pixel_values"] = torch.randn(batch, *tiles, 3, size, size, generator=rng)
        if tiles:
            inputs["image_sizes"] = torch.tensor([[2 * size, 2 * size]] * batch)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return {key: value.to(model.device) for key, value in inputs.items()}
