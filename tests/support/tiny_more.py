"""Tiny models of the families beyond the first eight."""

import torch
from tiny_core import (
    END_ID,
    HIDDEN,
    IMAGE_ID,
    PINPOINTS,
    START_ID,
    TEXT,
    VIDEO_ID,
    VISION,
    VOCAB,
    Tiny,
    anyres_pictures,
    qwen_pictures,
    random,
    run,
    square_pictures,
)
from tiny_towers import PatchTowerConfig
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig

PLAIN = {name: value for name, value in VISION.items() if name != "projection_dim"}
SIGLIP = {"model_type": "siglip_vision_model", **PLAIN, "vision_use_head": False}
SLIDING = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}


def config(name, image="image_token_id", **settings):
    """A config with our placeholder ids and untied embeddings."""
    settings = {image: IMAGE_ID, "tie_word_embeddings": False, "initializer_range": 0.3, **settings}
    return lambda: AutoConfig.for_model(name, **settings)


def llava_like(name, **settings):
    vision, text = CLIPVisionConfig(**VISION), LlamaConfig(**TEXT)
    return config(name, "image_token_index", vision_config=vision, text_config=text, **settings)


def model(kind, **settings):
    return {"model_type": kind, **TEXT, **settings}


def grid_vision(**settings):
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


def rope(**settings):
    return {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0, **settings}


def qwen3(name, **text):
    ids = {"video_token_id": VIDEO_ID, "vision_start_token_id": START_ID, "vision_end_token_id": END_ID}
    vision = grid_vision(num_position_embeddings=16, deepstack_visual_indexes=[0, 1])
    text = {**TEXT, "head_dim": 8, "rope_parameters": rope(mrope_interleaved=True), **text}
    return config(name, vision_config=vision, text_config=text, **ids)


def wrapped(tokens, stacked=False, name="pixel_values"):
    """Pictures of `tokens` tokens each, between a start and an end token."""

    def pictures(count, seed):
        pixels = random(count, 3, 16, 16, seed=seed)
        return {name: pixels[None] if stacked else pixels}, [[START_ID, *run(tokens), END_ID]] * count

    return pictures


def video_llava_pictures(count, seed):
    arguments, ids = square_pictures(16)(count, seed)
    return {"pixel_values_images": arguments["pixel_values"]}, ids


def tiles(write):
    """Every second picture is cut into two tiles and a whole view; `write(n)` gives the ids of n tiles."""

    def pictures(count, seed):
        numbers = [3 if i % 2 else 1 for i in range(count)]
        return {"pixel_values": random(sum(numbers), 3, 16, 16, seed=seed)}, [write(n) for n in numbers]

    return pictures


def perception_pictures(count, seed):
    # Every second picture is cut into two tiles; they are stacked as [pictures and tiles, 1, ...].
    numbers = [2 if i % 2 else 1 for i in range(count)]
    pixels = random(sum(numbers), 1, 3, 16, 16, seed=seed)
    return {"pixel_values": pixels}, [[START_ID, *run(4 * n), END_ID] for n in numbers]


def aya_ids(number):
    markers = [*range(94, 94 + number - 1), 97]  # <TILE_1> ... <TILE_GLOBAL>
    return [START_ID, *(token for marker in markers for token in (marker, *run(4))), END_ID]


def cohere_ids(number):
    return [START_ID, *[*run(4), 94] * number, END_ID]


def ovis_ids(number):
    tokens = [START_ID, *run(4), 93]  # the whole view and the mark of its grid, then tiles with a mark each
    return [*tokens, *[*run(4), 94] * (number - 1), 96]


def mistral_pictures(count, seed):
    sizes = [(16, 24) if i % 2 == 0 else (24, 16) for i in range(count)]
    pixels = torch.zeros(count, 3, 24, 24)
    ids = []
    for number, (height, width) in enumerate(sizes):
        pixels[number, :, :height, :width] = random(3, height, width, seed=seed + number)
        rows = [[*run(width // 8), 94] for _ in range(height // 8)]  # a mark ends each row, another one the picture
        ids.append([*[token for row in rows for token in row][:-1], END_ID])
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}, ids


def gemma4_pictures(count, seed):
    places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).reshape(16, 2)
    pixels = random(count, 16, 3 * 4 * 4, seed=seed)
    ids = [[START_ID, *run(4), END_ID]] * count
    return {"pixel_values": pixels, "image_position_ids": places.expand(count, -1, -1)}, ids


GEMMA4_TEXT = {
    **TEXT,
    "num_hidden_layers": 4,
    "head_dim": 8,
    "global_head_dim": 8,
    "sliding_window": 12,
    "layer_types": SLIDING["layer_types"] * 2,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 4,
    "use_bidirectional_attention": "vision",
}
GEMMA3N_TEXT = {
    **TEXT,
    "num_hidden_layers": 4,
    "head_dim": 8,
    "sliding_window": 12,
    "layer_types": SLIDING["layer_types"] * 2,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 94,
    "hidden_size_per_layer_input": 4,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
}
MORE = {
    "aria": Tiny(
        config(
            "aria",
            "image_token_index",
            vision_config={"model_type": "idefics3_vision", **PLAIN},
            text_config={**TEXT, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
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
            vision_config=PatchTowerConfig(hidden_size=16),
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
            vision_config=PatchTowerConfig(hidden_size=16, vocab_size=4, vocab_offset=94),
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
            vision_config=PatchTowerConfig(
                hidden_size=16, flat=True, model_args={"embed_dim": 16, "ref_feat_shape": [4, 4]}
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
    "vipllava": Tiny(llava_like("vipllava", vision_feature_layer=[-1, -2]), square_pictures(16)),
}
