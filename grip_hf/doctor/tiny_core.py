"""What tiny models are made of, and the first eight families."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, Qwen2Config, SiglipVisionConfig

from .pictures import (
    END_ID,
    IMAGE_ID,
    PAD,
    START_ID,
    VIDEO_ID,
    Pictures,
    anyres_pictures,
    marked_pictures,
    qwen_pictures,
    square_pictures,
    tiled_pictures,
)

IMAGE = "image"
VOCAB, HIDDEN = 99, 32
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.3,
    "projection_dim": 16,
}
PINPOINTS = [[16, 32], [32, 16], [32, 32]]


@dataclasses.dataclass(frozen=True)
class Tiny:
    """How to build a tiny model of one family, and its picture inputs.

    `config` gives a transformers config. `pictures(count, seed)` gives the picture arguments of `count` pictures and,
    per picture, the ids of its placeholder tokens with everything that belongs around them. `stacked` families take
    pictures as [batch, pictures, ...], the others one after the other. `types` names the argument with token types,
    which are `type_ids` = (text before, picture, text after). `crops` is the number of patches of a picture where the
    arguments count patches over the whole batch. `experts` families send pictures and what is around them to experts.
    """

    config: Callable[[], Any]
    pictures: Pictures
    stacked: bool = False
    types: str | None = None
    type_ids: tuple[int, int, int] = (0, 1, 0)
    crops: int = 0
    experts: bool = False


def text(**extra: Any) -> LlamaConfig:
    """The text config of most families."""
    return LlamaConfig(**TEXT, **extra)


def qwen_text() -> Qwen2Config:
    """The text config of families that build on Qwen2."""
    return Qwen2Config(**TEXT)


def llava_config() -> Any:
    """LLaVA."""
    return AutoConfig.for_model(
        "llava",
        vision_config=CLIPVisionConfig(**VISION),
        text_config=text(),
        image_token_index=IMAGE_ID,
        image_token_id=IMAGE_ID,
        vision_feature_layer=-1,
    )


def _llava_next() -> Any:
    return AutoConfig.for_model(
        "llava_next",
        vision_config=CLIPVisionConfig(**VISION),
        text_config=text(),
        image_token_index=IMAGE_ID,
        image_token_id=IMAGE_ID,
        vision_feature_layer=-1,
        image_grid_pinpoints=PINPOINTS,
    )


def _llava_onevision() -> Any:
    return AutoConfig.for_model(
        "llava_onevision",
        vision_config=SiglipVisionConfig(**{k: v for k, v in VISION.items() if k != "projection_dim"}),
        text_config=qwen_text(),
        image_token_index=IMAGE_ID,
        image_token_id=IMAGE_ID,
        video_token_index=VIDEO_ID,
        video_token_id=VIDEO_ID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_9",
    )


def _qwen_vision(**extra: Any) -> dict[str, Any]:
    return {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4, **extra}


def _qwen(name: str, vision: dict[str, Any]) -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    return AutoConfig.for_model(
        name,
        vision_config=vision,
        text_config={**TEXT, "rope_parameters": rope},
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        vision_start_token_id=START_ID,
        vision_end_token_id=END_ID,
    )


def _qwen2_vl() -> Any:
    return _qwen("qwen2_vl", _qwen_vision(hidden_size=HIDDEN, mlp_ratio=2))


def _qwen2_5_vl() -> Any:
    return _qwen(
        "qwen2_5_vl",
        _qwen_vision(intermediate_size=24, out_hidden_size=HIDDEN, fullatt_block_indexes=[1], window_size=16),
    )


def _internvl() -> Any:
    vision = {k: v for k, v in VISION.items() if k not in ("image_size", "patch_size", "projection_dim")}
    return AutoConfig.for_model(
        "internvl",
        vision_config={**vision, "image_size": [16, 16], "patch_size": [4, 4]},
        text_config=qwen_text(),
        image_token_id=IMAGE_ID,
        image_seq_length=4,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )


def _idefics(name: str) -> Any:
    vision = {k: v for k, v in VISION.items() if k != "projection_dim"}
    return AutoConfig.for_model(
        name, vision_config=vision, text_config=text(), image_token_id=IMAGE_ID, scale_factor=2, pad_token_id=PAD
    )


PLAIN = {name: value for name, value in VISION.items() if name != "projection_dim"}
SIGLIP = {"model_type": "siglip_vision_model", **PLAIN, "vision_use_head": False}
SLIDING: dict[str, Any] = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}


def config(name: str, image: str = "image_token_id", **settings: Any) -> Callable[[], Any]:
    """A config with our placeholder ids and untied embeddings; parts that are callables are made when it is."""
    settings = {image: IMAGE_ID, "tie_word_embeddings": False, "initializer_range": 0.3, **settings}
    return lambda: AutoConfig.for_model(
        name, **{key: one() if callable(one) else one for key, one in settings.items()}
    )


def llava_like(name: str, **settings: Any) -> Callable[[], Any]:
    """A relative of LLaVA."""
    vision = partial(CLIPVisionConfig, **VISION)
    return config(name, "image_token_index", vision_config=vision, text_config=text, **settings)


def model(kind: str, **settings: Any) -> dict[str, Any]:
    """The text config of another type."""
    return {"model_type": kind, **TEXT, **settings}


def grid_vision(**settings: Any) -> dict[str, Any]:
    """The vision config of Qwen2.5-VL and its relatives."""
    return {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": HIDDEN,
        "initializer_range": 0.3,
        **settings,
    }


def rope(**settings: Any) -> dict[str, Any]:
    """M-RoPE."""
    return {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0, **settings}


CORE: dict[str, Tiny] = {
    "llava": Tiny(llava_config, square_pictures(16)),
    "llava_next": Tiny(_llava_next, anyres_pictures),
    "llava_onevision": Tiny(_llava_onevision, anyres_pictures),
    "qwen2_vl": Tiny(_qwen2_vl, qwen_pictures, types="mm_token_type_ids"),
    "qwen2_5_vl": Tiny(_qwen2_5_vl, qwen_pictures, types="mm_token_type_ids"),
    "internvl": Tiny(_internvl, tiled_pictures),
    "smolvlm": Tiny(lambda: _idefics("smolvlm"), marked_pictures, stacked=True),
    "idefics3": Tiny(lambda: _idefics("idefics3"), marked_pictures, stacked=True),
}
