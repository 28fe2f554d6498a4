"""Tiny models of every supported family, built in code, and inputs for them.

    model = build("llava", attention="eager")
    inputs = make_inputs(model, [["a", IMAGE, "b"], ["c"]], seed=0)

A prompt is a list of parts: an int n stands for n random text tokens, `IMAGE` for one picture. Rows are left-padded.
"""

import dataclasses
from collections.abc import Callable

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

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
    per picture, the ids of its placeholder tokens with everything that belongs around them.
    """

    config: Callable
    pictures: Callable


def _text(**extra):
    return LlamaConfig(**TEXT, **extra)


def _qwen_text():
    return Qwen2Config(**TEXT)


def _random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _run(count):
    return [IMAGE_ID] * count


def _llava():
    return AutoConfig.for_model(
        "llava",
        vision_config=CLIPVisionConfig(**VISION),
        text_config=_text(),
        image_token_index=IMAGE_ID,
        image_token_id=IMAGE_ID,
        vision_feature_layer=-1,
    )


def _square_pictures(tokens):
    def pictures(count, seed):
        return {"pixel_values": _random(count, 3, 16, 16, seed=seed)}, [_run(tokens)] * count

    return pictures


def _llava_next():
    return AutoConfig.for_model(
        "llava_next",
        vision_config=CLIPVisionConfig(**VISION),
        text_config=_text(),
        image_token_index=IMAGE_ID,
        image_token_id=IMAGE_ID,
        vision_feature_layer=-1,
        image_grid_pinpoints=PINPOINTS,
    )


def _llava_onevision():
    return AutoConfig.for_model(
        "llava_onevision",
        vision_config=SiglipVisionConfig(**{k: v for k, v in VISION.items() if k != "projection_dim"}),
        text_config=_qwen_text(),
        image_token_index=IMAGE_ID,
        image_token_id=IMAGE_ID,
        video_token_index=VIDEO_ID,
        video_token_id=VIDEO_ID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_9",
    )


def _anyres_pictures(count, seed):
    # Alternating shapes: 16 x 32 (one row of two patches) and 32 x 16.
    sizes = [(16, 32) if i % 2 == 0 else (32, 16) for i in range(count)]
    tokens = [16 + (h // 4) * (w // 4 + 1) for h, w in sizes]
    pixels = _random(count, 3, 3, 16, 16, seed=seed)  # the whole picture and its two patches
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}, [_run(n) for n in tokens]


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


def _qwen_pictures(count, seed):
    grids = [(1, 4, 6) if i % 2 == 0 else (1, 6, 4) for i in range(count)]  # patches; 2 x 2 are merged
    patches = sum(t * h * w for t, h, w in grids)
    pixels = _random(patches, 3 * 2 * 4 * 4, seed=seed)
    ids = [[START_ID, *_run(t * h * w // 4), END_ID] for t, h, w in grids]
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor(grids)}, ids


def _internvl():
    vision = {k: v for k, v in VISION.items() if k not in ("image_size", "patch_size", "projection_dim")}
    return AutoConfig.for_model(
        "internvl",
        vision_config={**vision, "image_size": [16, 16], "patch_size": [4, 4]},
        text_config=_qwen_text(),
        image_token_id=IMAGE_ID,
        image_seq_length=4,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
    )


def _tiled_pictures(count, seed):
    # Every second picture is cut into two tiles; all tiles of a picture make one run.
    tiles = [2 if i % 2 else 1 for i in range(count)]
    pixels = _random(sum(tiles), 3, 16, 16, seed=seed)
    return {"pixel_values": pixels}, [[START_ID, *_run(4 * n), END_ID] for n in tiles]


def _idefics(name):
    vision = {k: v for k, v in VISION.items() if k != "projection_dim"}
    return AutoConfig.for_model(
        name, vision_config=vision, text_config=_text(), image_token_id=IMAGE_ID, scale_factor=2, pad_token_id=PAD
    )


def _marked_pictures(count, seed):
    # Each picture is one tile row of two and a whole view, each with its own marker token, as the processor writes it.
    markers = (94, 95, 96)
    pixels = _random(1, 3 * count, 3, 16, 16, seed=seed)
    ids = [token for marker in markers for token in (START_ID, marker, *_run(4))] + [START_ID]
    return {"pixel_values": pixels}, [ids] * count


TINY = {
    "llava": Tiny(_llava, _square_pictures(16)),
    "llava_next": Tiny(_llava_next, _anyres_pictures),
    "llava_onevision": Tiny(_llava_onevision, _anyres_pictures),
    "qwen2_vl": Tiny(_qwen2_vl, _qwen_pictures),
    "qwen2_5_vl": Tiny(_qwen2_5_vl, _qwen_pictures),
    "internvl": Tiny(_internvl, _tiled_pictures),
    "smolvlm": Tiny(lambda: _idefics("smolvlm"), _marked_pictures),
    "idefics3": Tiny(lambda: _idefics("idefics3"), _marked_pictures),
}


def build(family, attention="sdpa", seed=0, dtype=torch.float32):
    """Build a tiny model in eval mode; the same weights for the same seed."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(TINY[family].config(), attn_implementation=attention, dtype=dtype)
    with torch.no_grad():
        model.lm_head.weight[89:] = 0  # such a model never says a placeholder or marker token
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.eval()


def make_inputs(family, prompts, seed=0, pad_to=None):
    """Inputs for a left-padded batch; each prompt is a list of ints (that many text tokens) and `IMAGE`.

    A prompt's text and pictures depend on the seed and the prompt's own content only, so that a row of a batch can be
    compared with the same prompt alone.
    """
    rows, pictures = [], []
    for prompt in prompts:
        count = prompt.count(IMAGE)
        arguments, runs = TINY[family].pictures(count, seed + 7 * len(prompt)) if count else ({}, [])
        generator = torch.Generator().manual_seed(seed + 1000 * len(prompt))
        runs, row = iter(runs), []
        for part in prompt:
            text = torch.randint(3, 89, (part,), generator=generator).tolist() if part != IMAGE else next(runs)
            row += text
        rows.append(row)
        if count:
            pictures.append(arguments)
    length = max(max(map(len, rows)), pad_to or 0)
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask, **_join(family, pictures)}
    if "image_grid_thw" in inputs or family.startswith("qwen"):
        inputs["mm_token_type_ids"] = (ids == IMAGE_ID).int()
    return inputs


def _join(family, pictures):
    """Picture arguments of several prompts as one batch."""
    if not pictures:
        return {}
    if family in ("smolvlm", "idefics3"):  # [batch, pictures, ...], empty pictures are zeros
        most = max(one["pixel_values"].shape[1] for one in pictures)
        pad = [
            torch.nn.functional.pad(p["pixel_values"], (0,) * 7 + (most - p["pixel_values"].shape[1],))
            for p in pictures
        ]
        return {"pixel_values": torch.cat(pad)}
    return {name: torch.cat([one[name] for one in pictures]) for name in pictures[0]}


def select_by_content(batch):
    """A selector for tests: scores depend on each token alone, without ties or dependence on the batch."""
    weights = torch.linspace(-1, 1, batch.tokens.shape[-1], dtype=batch.tokens.dtype)
    return (batch.tokens * weights).sum(-1).float()
