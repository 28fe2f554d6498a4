"""Tiny models of the families beyond the first eight."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from .pictures import (
    END_ID,
    START_ID,
    VIDEO_ID,
    anyres_pictures,
    aya_ids,
    cohere_ids,
    gemma4_pictures,
    mistral_pictures,
    ovis_ids,
    perception_pictures,
    qwen_pictures,
    square_pictures,
    tiles,
    video_llava_pictures,
    wrapped,
)
from .tiny_core import (
    HIDDEN,
    PINPOINTS,
    PLAIN,
    SIGLIP,
    SLIDING,
    TEXT,
    VOCAB,
    Tiny,
    config,
    grid_vision,
    llava_like,
    model,
    rope,
)
from .towers import PatchTowerConfig


def qwen3(name: str, **text: Any) -> Callable[[], Any]:
    """Qwen3-VL and its mixture of experts."""
    ids: dict[str, Any] = {
        "video_token_id": VIDEO_ID,
        "vision_start_token_id": START_ID,
        "vision_end_token_id": END_ID,
    }
    vision = grid_vision(num_position_embeddings=16, deepstack_visual_indexes=[0, 1])
    text = {**TEXT, "head_dim": 8, "rope_parameters": rope(mrope_interleaved=True), **text}
    return config(name, vision_config=vision, text_config=text, **ids)


GEMMA_TEXT = {
    **TEXT,
    "num_hidden_layers": 4,
    "head_dim": 8,
    "sliding_window": 12,
    "layer_types": [*SLIDING["layer_types"], *SLIDING["layer_types"]],
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 4,
}
GEMMA4_TEXT = {
    **GEMMA_TEXT,
    "global_head_dim": 8,
    "vocab_size_per_layer_input": VOCAB,
    "use_bidirectional_attention": "vision",
}
GEMMA3N_TEXT = {**GEMMA_TEXT, "vocab_size_per_layer_input": 94, "laurel_rank": 4, "altup_num_inputs": 2}

MORE: dict[str, Tiny] = {
    "aria": Tiny(
        config(
            "aria",
            "image_token_index",
            vision_config={"model_type": "idefics3_vision", **PLAIN},
            text_config=model("aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
            projector_patch_to_query_dict={16: 6},
        ),
        wrapped(6),
    ),
    "aya_vision": Tiny(
        config("aya_vision", "image_token_index", vision_config=SIGLIP, text_config=model("cohere2", **SLIDING)),
        tiles(aya_ids),
    ),
    "cohere2_vision": Tiny(
        config(
            "cohere2_vision",
            vision_config=SIGLIP,
            text_config=model("cohere2", **SLIDING),
            alignment_intermediate_size=24,
        ),
        tiles(cohere_ids),
    ),
    "deepseek_vl": Tiny(config("deepseek_vl", vision_config=SIGLIP, text_config=model("llama")), square_pictures(16)),
    "fast_vlm": Tiny(
        config(
            "fast_vlm",
            "image_token_index",
            vision_config=partial(PatchTowerConfig, hidden_size=16),
            text_config=model("qwen2"),
            image_seq_length=16,
        ),
        square_pictures(16),
    ),
    "gemma3": Tiny(
        config(
            "gemma3",
            "image_token_index",
            vision_config=SIGLIP,
            text_config={**TEXT, "head_dim": 8, "query_pre_attn_scalar": 8, **SLIDING},
            boi_token_index=START_ID,
            eoi_token_index=END_ID,
            mm_tokens_per_image=4,
        ),
        wrapped(4),
        types="token_type_ids",
    ),
    "gemma3n": Tiny(
        config(
            "gemma3n",
            vision_config=partial(PatchTowerConfig, hidden_size=16, vocab_size=4, vocab_offset=94),
            text_config=GEMMA3N_TEXT,
            audio_config={
                "vocab_size": 2,
                "vocab_offset": 98,
                "input_feat_size": 8,
                "hidden_size": 16,
                "conf_num_attention_heads": 2,
                "conf_num_hidden_layers": 1,
                "sscp_conv_channel_size": [4, 4],
            },
            vision_soft_tokens_per_image=16,
            audio_token_id=98,
            boi_token_id=START_ID,
            eoi_token_id=END_ID,
        ),
        wrapped(16),
    ),
    "gemma4": Tiny(
        config(
            "gemma4",
            vision_config={
                **{name: PLAIN[name] for name in PLAIN if name != "image_size"},
                "num_key_value_heads": 2,
                "head_dim": 8,
                "pooling_kernel_size": 2,
                "position_embedding_size": 64,
            },
            text_config=GEMMA4_TEXT,
            audio_config=None,
            video_token_id=VIDEO_ID,
            audio_token_id=98,
            boi_token_id=START_ID,
            eoi_token_id=END_ID,
        ),
        gemma4_pictures,
        types="mm_token_type_ids",
    ),
    "glm4v": Tiny(
        config(
            "glm4v",
            vision_config=grid_vision(image_size=16),
            text_config={**TEXT, "rope_parameters": rope(partial_rotary_factor=1.0)},
            video_token_id=VIDEO_ID,
            image_start_token_id=START_ID,
            image_end_token_id=END_ID,
            video_start_token_id=94,
            video_end_token_id=95,
        ),
        qwen_pictures,
        types="mm_token_type_ids",
    ),
    "idefics2": Tiny(
        config(
            "idefics2",
            vision_config=dict(PLAIN),
            perceiver_config={
                "hidden_size": HIDDEN,
                "resampler_n_latents": 6,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 8,
                "num_key_value_heads": 1,
            },
            text_config=model("mistral", sliding_window=None),
        ),
        wrapped(6, stacked=True),
        stacked=True,
    ),
    "janus": Tiny(
        config(
            "janus",
            vision_config={
                **{name: PLAIN[name] for name in PLAIN if name != "intermediate_size"},
                "mlp_ratio": 2,
                "projection_dim": HIDDEN,
                "num_image_tokens": 16,
            },
            vq_config={
                "embed_dim": 4,
                "num_embeddings": 8,
                "latent_channels": 8,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "projection_dim": HIDDEN,
                "image_token_embed_dim": HIDDEN,
            },
            text_config=model("llama"),
        ),
        square_pictures(16),
    ),
    "llava_next_video": Tiny(
        llava_like(
            "llava_next_video", video_token_index=VIDEO_ID, vision_feature_layer=-1, image_grid_pinpoints=PINPOINTS
        ),
        anyres_pictures,
    ),
    "mistral3": Tiny(
        config(
            "mistral3",
            "image_token_index",
            vision_config={**PLAIN, "model_type": "pixtral", "image_size": 32},
            text_config=model("mistral", head_dim=8, sliding_window=16),
        ),
        mistral_pictures,
    ),
    "ovis2": Tiny(
        config(
            "ovis2",
            vision_config={**PLAIN, "vocab_size": 40, "hidden_stride": 2, "num_visual_indicator_tokens": 5},
            text_config=model("qwen2"),
            visual_indicator_token_ids=[START_ID, 93, 94, 95, 96],
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
        ),
        tiles(ovis_ids),
    ),
    "paligemma": Tiny(  # the prompt sees all of itself, the answer what is before it
        config("paligemma", vision_config=SIGLIP, text_config=model("gemma", head_dim=8), projection_dim=HIDDEN),
        square_pictures(16),
        types="token_type_ids",
        type_ids=(0, 0, 1),
    ),
    "perception_lm": Tiny(
        config(
            "perception_lm",
            vision_config=partial(
                PatchTowerConfig, hidden_size=16, flat=True, model_args={"embed_dim": 16, "ref_feat_shape": [4, 4]}
            ),
            text_config=model("llama"),
            video_token_id=VIDEO_ID,
            projector_pooling_ratio=2,
        ),
        perception_pictures,
    ),
    "qwen3_vl": Tiny(qwen3("qwen3_vl"), qwen_pictures, types="mm_token_type_ids"),
    "qwen3_vl_moe": Tiny(
        qwen3("qwen3_vl_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1),
        qwen_pictures,
        types="mm_token_type_ids",
    ),
    "video_llava": Tiny(
        llava_like("video_llava", video_token_index=VIDEO_ID, vision_feature_layer=-1), video_llava_pictures
    ),
    "vipllava": Tiny(  # the setting had the other name up to 5.22
        llava_like("vipllava", vision_feature_layer=[-1, -2], vision_feature_layers=[-1, -2]), square_pictures(16)
    ),
}
