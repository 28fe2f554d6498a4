"""Tiny models of the families added last; most of their tests are slow ones, because each has an older relative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .pictures import (
    END_ID,
    START_ID,
    VIDEO_ID,
    ernie_pictures,
    lfm_pictures,
    molmo_pictures,
    ocr_pictures,
    qwen_pictures,
    square_pictures,
    tiled_pictures,
    unmarked_pictures,
    video_llama_pictures,
)
from .tiny_core import HIDDEN, PLAIN, SIGLIP, SLIDING, TEXT, Tiny, config, grid_vision, model, rope

MARKS: dict[str, Any] = {"image_start_token_id": START_ID, "image_end_token_id": END_ID}
VIDEO_MARKS: dict[str, Any] = {"video_token_id": VIDEO_ID, "video_start_token_id": 94, "video_end_token_id": 95}
RECURRENT: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def qwen3_5(name: str, **text: Any) -> Callable[[], Any]:
    """Qwen3.5 and its mixture of experts."""
    positions = rope(mrope_interleaved=True, partial_rotary_factor=1.0)
    return config(
        name,
        vision_config=grid_vision(num_position_embeddings=16),
        text_config={**TEXT, "head_dim": 8, "rope_parameters": positions, **RECURRENT, **text},
        video_token_id=VIDEO_ID,
        vision_start_token_id=START_ID,
        vision_end_token_id=END_ID,
    )


def glm(name: str, **text: Any) -> Callable[[], Any]:
    """GLM-4.1V and its relatives."""
    text = {**TEXT, "rope_parameters": rope(partial_rotary_factor=1.0), **text}
    return config(name, vision_config=grid_vision(image_size=16), text_config=text, **MARKS, **VIDEO_MARKS)


LATE: dict[str, Tiny] = {
    "ernie4_5_vl_moe": Tiny(
        config(
            "ernie4_5_vl_moe",
            vision_config={**{k: v for k, v in grid_vision().items() if k != "out_hidden_size"}},
            text_config={
                **TEXT,
                "rope_parameters": rope(),
                "mlp_layer_types": ["dense", "sparse"],
                "moe_intermediate_size": [16, 8],
                "moe_num_experts": 4,
                "moe_k": 2,
                "moe_num_shared_experts": 1,
            },
            **MARKS,
            **VIDEO_MARKS,
        ),
        ernie_pictures,
        types="mm_token_type_ids",
        experts=True,
    ),
    "exaone4_5": Tiny(
        config(
            "exaone4_5",
            vision_config=grid_vision(num_key_value_heads=1, fullatt_block_indexes=[1], window_size=16),
            text_config=model("exaone4", **SLIDING),
            video_token_id=VIDEO_ID,
        ),
        qwen_pictures,
    ),
    "glm46v": Tiny(glm("glm46v"), qwen_pictures, types="mm_token_type_ids"),
    "glm4v_moe": Tiny(
        glm("glm4v_moe", n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, attention_bias=False),
        qwen_pictures,
        types="mm_token_type_ids",
    ),
    "glm_ocr": Tiny(glm("glm_ocr"), qwen_pictures, types="mm_token_type_ids"),
    "got_ocr2": Tiny(
        config(
            "got_ocr2",
            "image_token_index",
            vision_config={
                **{name: PLAIN[name] for name in PLAIN if name != "intermediate_size"},
                "image_size": 32,
                "output_channels": 8,
                "mlp_dim": 24,
                "window_size": 4,
                "global_attn_indexes": [1],
            },
            text_config=model("qwen2"),
        ),
        ocr_pictures,
    ),
    "lfm2_vl": Tiny(
        config(
            "lfm2_vl",
            vision_config={
                **{name: PLAIN[name] for name in PLAIN if name != "image_size"},
                "model_type": "siglip2_vision_model",
                "num_patches": 16,
                "vision_use_head": False,
            },
            text_config=model("lfm2", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
            projector_hidden_size=24,
        ),
        lfm_pictures,
    ),
    "lighton_ocr": Tiny(
        config(
            "lighton_ocr",
            vision_config={**PLAIN, "model_type": "pixtral", "image_size": 32},
            text_config=model("qwen3", head_dim=8),
        ),
        unmarked_pictures,
    ),
    "molmo2": Tiny(
        config(
            "molmo2",
            "image_patch_id",
            vision_config={**PLAIN, "image_size": [16, 16], "num_key_value_heads": 2, "head_dim": 8},
            adapter_config={
                "vision_feature_layer": [1, 0],
                "hidden_size": 16,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "intermediate_size": 24,
                "text_hidden_size": HIDDEN,
                "initializer_range": 0.3,
            },
            text_config={**TEXT, "head_dim": 8, "additional_vocab_size": 1},
            low_res_image_start_token_id=START_ID,
            image_start_token_id=95,
            image_end_token_id=END_ID,
            frame_start_token_id=96,
            frame_end_token_id=97,
        ),
        molmo_pictures,
        types="mm_token_type_ids",
        crops=32,
    ),
    "paligemma2": Tiny(  # the PaliGemma model with the next text decoder
        config(
            "paligemma",
            vision_config=SIGLIP,
            text_config=model("gemma2", head_dim=8, query_pre_attn_scalar=8, **SLIDING),
            projection_dim=HIDDEN,
        ),
        square_pictures(16),
        types="token_type_ids",
        type_ids=(0, 0, 1),
    ),
    "qianfan_ocr": Tiny(
        config(
            "qianfan_ocr",
            vision_config={
                **{name: value for name, value in PLAIN.items() if "size" not in name or name == "hidden_size"},
                "intermediate_size": 24,
                "image_size": [16, 16],
                "patch_size": [4, 4],
            },
            text_config=model("qwen3", head_dim=8),
            image_seq_length=4,
        ),
        tiled_pictures,
    ),
    "qwen3_5": Tiny(qwen3_5("qwen3_5"), qwen_pictures, types="mm_token_type_ids"),
    "qwen3_5_moe": Tiny(
        qwen3_5("qwen3_5_moe", shared_expert_intermediate_size=16, **EXPERTS),
        qwen_pictures,
        types="mm_token_type_ids",
    ),
    "video_llama_3": Tiny(
        config(
            "video_llama_3",
            vision_config={name: PLAIN[name] for name in PLAIN if name != "image_size"},
            text_config=model("qwen2"),
            video_token_id=VIDEO_ID,
        ),
        video_llama_pictures,
    ),
}
