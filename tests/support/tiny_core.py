"""What the tiny models of tests/support/tiny.py are made of, and the first eight families."""

import dataclasses
from collections.abc import Callable

import torch
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, Qwen2Config, SiglipVisionConfig

IMAGE = "image"
VOCAB, HIDDEN = 99, 32
PAD, IMAGE_ID, VIDEO_ID, START_ID, END_ID = 0, 90, 91, 92, 93
TEXT = {
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
VISION = {
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

    config: Callable
    pictures: Callable
    stacked: bool = False
    types: str | None = None
    type_ids: tuple[int, int, int] = (0, 1, 0)
    crops: int = 0
    experts: bool = False


def text(**extra):
    return LlamaConfig(**TEXT, **extra)


def qwen_text():
    return Qwen2Config(**TEXT)


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(count):
    return [IMAGE_ID] * count


def llava_config():
    return AutoConfig.for_model(
        "llava",
        vision_config=CLIPVisionConfig(**VISION),
        text_config=text(),
        image_token_index=IMAGE_ID,
        image_token_id=IMAGE_ID,
        vision_feature_layer=-1,
    )


def square_pictures(tokens):
    def pictures(count, seed):
        return {"pixel_values": random(count, 3, 16, 16, seed=seed)}, [run(tokens)] * count

    return pictures


def _llava_next():
    return AutoConfig.for_model(
        "llava_next",
        vision_config=CLIPVisionConfig(**VISION),
        text_config=text(),
        image_token_index=IMAGE_ID,
        image_token_id=IMAGE_ID,
        vision_feature_layer=-1,
        image_grid_pinpoints=PINPOINTS,
    )


def _llava_onevision():
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


def anyres_pictures(count, seed):
    # Alternating shapes: 16 x 32 (one row of two patches) and 32 x 16.
    sizes = [(16, 32) if i % 2 == 0 else (32, 16) for i in range(count)]
    tokens = [16 + (h // 4) * (w // 4 + 1) for h, w in sizes]
    pixels = random(count, 3, 3, 16, 16, seed=seed)  # the whole picture and its two patches
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}, [run(n) for n in tokens]


def _qwen_vision(**extra):
    return {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4, **extra}


def _qwen(name, vision):
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


def _qwen2_vl():
    return _qwen("qwen2_vl", _qwen_vision(hidden_size=HIDDEN, mlp_ratio=2))


def _qwen2_5_vl():
    return _qwen(
        "qwen2_5_vl",
        _qwen_vision(intermediate_size=24, out_hidden_size=HIDDEN, fullatt_block_indexes=[1], window_size=16),
    )


def qwen_pictures(count, seed):
    grids = [(1, 4, 6) if i % 2 == 0 else (1, 6, 4) for i in range(count)]  # patches; 2 x 2 are merged
    patches = sum(t * h * w for t, h, w in grids)
    pixels = random(patches, 3 * 2 * 4 * 4, seed=seed)
    ids = [[START_ID, *run(t * h * w // 4), END_ID] for t, h, w in grids]
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor(grids)}, ids


def _internvl():
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


def tiled_pictures(count, seed):
    # Every second picture is cut into two tiles; all tiles of a picture make one run.
    tiles = [2 if i % 2 else 1 for i in range(count)]
    pixels = random(sum(tiles), 3, 16, 16, seed=seed)
    return {"pixel_values": pixels}, [[START_ID, *run(4 * n), END_ID] for n in tiles]


def _idefics(name):
    vision = {k: v for k, v in VISION.items() if k != "projection_dim"}
    return AutoConfig.for_model(
        name, vision_config=vision, text_config=text(), image_token_id=IMAGE_ID, scale_factor=2, pad_token_id=PAD
    )


def marked_pictures(count, seed):
    # Each picture is one tile row of two and a whole view, each with its own marker token, as the processor writes it.
    markers = (94, 95, 96)
    pixels = random(1, 3 * count, 3, 16, 16, seed=seed)
    ids = [token for marker in markers for token in (START_ID, marker, *run(4))] + [START_ID]
    return {"pixel_values": pixels}, [ids] * count


CORE = {
    "llava": Tiny(llava_config, square_pictures(16)),
    "llava_next": Tiny(_llava_next, anyres_pictures),
    "llava_onevision": Tiny(_llava_onevision, anyres_pictures),
    "qwen2_vl": Tiny(_qwen2_vl, qwen_pictures, types="mm_token_type_ids"),
    "qwen2_5_vl": Tiny(_qwen2_5_vl, qwen_pictures, types="mm_token_type_ids"),
    "internvl": Tiny(_internvl, tiled_pictures),
    "smolvlm": Tiny(lambda: _idefics("smolvlm"), marked_pictures, stacked=True),
    "idefics3": Tiny(lambda: _idefics("idefics3"), marked_pictures, stacked=True),
}
