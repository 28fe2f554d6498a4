"""Tiny checkpoints with random weights and real processors, one per family, as vLLM serves them.

folder = write("qwen2_vl", tmp_path)
prompt = PROMPTS["qwen2_vl"] + "a b c"
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from grip_hf.pocket.names import name_for_all_readers

HIDDEN, WORDS = 64, [f"w{number}" for number in range(100)]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<video>", "<|image_pad|>", "<|video_pad|>"]
SPECIAL += ["<|vision_start|>", "<|vision_end|>", "<IMG_CONTEXT>", "<img>", "</img>", "<fake_token_around_image>"]
SPECIAL += ["<global-img>", "<end_of_utterance>", "<row_1_col_1>", "<row_1_col_2>", "<row_2_col_1>", "<row_2_col_2>"]
SPECIAL += ["<image_soft_token>", "<start_of_image>", "<end_of_image>", "\n", "\n\n", "\n\n\n", "\n\n\n\n"]
IDS = {token: number for number, token in enumerate([*SPECIAL, *WORDS])}
TEXT = {
    "vocab_size": len(IDS),
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": IDS["<s>"],
    "eos_token_id": IDS["</s>"],
    "pad_token_id": IDS["<pad>"],
}
VISION = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIDE, PATCH = 32, 4
PINPOINTS = [[32, 64], [64, 32], [64, 64]]
PICTURE = {"size": {"height": SIDE, "width": SIDE}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def tokenizer(**named):
    words = Tokenizer(WordLevel(IDS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", IDS["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={**named, **{f"extra_{number}": token for number, token in enumerate(SPECIAL[4:])}},
        model_input_names=["input_ids", "attention_mask"],
    )


def clip():
    return CLIPVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH)


def siglip():
    return SiglipVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH)


def llava():
    from transformers import LlavaProcessor
    from transformers.models.clip import CLIPImageProcessorPil

    config = AutoConfig.for_model(
        "llava",
        vision_config=clip(),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IDS["<image>"],
        vision_feature_layer=-1,
    )
    pictures = CLIPImageProcessorPil(**PICTURE, crop_size=PICTURE["size"], do_center_crop=False)
    return config, LlavaProcessor(
        pictures, tokenizer(), PATCH, "default", image_token="<image>", num_additional_image_tokens=1
    )


def llava_next():
    from transformers import LlavaNextProcessor
    from transformers.models.llava_next import LlavaNextImageProcessorPil

    config = AutoConfig.for_model(
        "llava_next",
        vision_config=clip(),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IDS["<image>"],
        vision_feature_layer=-1,
        image_grid_pinpoints=PINPOINTS,
    )
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": PICTURE["size"], "image_grid_pinpoints": PINPOINTS}
    pictures = LlavaNextImageProcessorPil(**{**PICTURE, **sizes})
    return config, LlavaNextProcessor(
        pictures, tokenizer(), PATCH, "default", image_token="<image>", num_additional_image_tokens=1
    )


def llava_onevision():
    from transformers import LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor
    from transformers.models.llava_onevision import LlavaOnevisionImageProcessorPil

    config = AutoConfig.for_model(
        "llava_onevision",
        vision_config=siglip(),
        text_config=Qwen2Config(**TEXT),
        image_token_index=IDS["<image>"],
        video_token_index=IDS["<video>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_9",
    )
    pictures = LlavaOnevisionImageProcessorPil(**{**PICTURE, "image_grid_pinpoints": PINPOINTS})
    return config, LlavaOnevisionProcessor(
        pictures,
        tokenizer(),
        LlavaOnevisionVideoProcessor(**PICTURE),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
    )


def qwen(name, vision, **rope):
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0, **rope}
    return AutoConfig.for_model(
        name,
        vision_config=vision,
        text_config={**TEXT, "rope_parameters": rope},
        image_token_id=IDS["<|image_pad|>"],
        video_token_id=IDS["<|video_pad|>"],
        vision_start_token_id=IDS["<|vision_start|>"],
        vision_end_token_id=IDS["<|vision_end|>"],
    )


def qwen_pictures():
    from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, size={"shortest_edge": 256, "longest_edge": 4096})


def qwen2_vl():
    from transformers import Qwen2VLProcessor, Qwen2VLVideoProcessor

    vision = {"depth": 2, "embed_dim": 64, "hidden_size": HIDDEN, "num_heads": 2, "patch_size": PATCH, "mlp_ratio": 2}
    video = Qwen2VLVideoProcessor(patch_size=PATCH, merge_size=2)
    return qwen("qwen2_vl", vision), Qwen2VLProcessor(qwen_pictures(), tokenizer(), video)


def qwen2_5_vl():
    from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor

    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "patch_size": PATCH}
    vision |= {"out_hidden_size": HIDDEN, "fullatt_block_indexes": [1], "window_size": 16}
    video = Qwen2VLVideoProcessor(patch_size=PATCH, merge_size=2)
    return qwen("qwen2_5_vl", vision), Qwen2_5_VLProcessor(qwen_pictures(), tokenizer(), video)


def qwen3_vl():
    from transformers import Qwen3VLProcessor, Qwen3VLVideoProcessor

    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "patch_size": PATCH}
    vision |= {"out_hidden_size": HIDDEN, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    config = qwen("qwen3_vl", vision, mrope_interleaved=True)
    video = Qwen3VLVideoProcessor(patch_size=PATCH, merge_size=2)
    return config, Qwen3VLProcessor(qwen_pictures(), tokenizer(), video)


def internvl():
    from transformers import InternVLProcessor, InternVLVideoProcessor
    from transformers.models.got_ocr2 import GotOcr2ImageProcessorPil

    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    config = AutoConfig.for_model(
        "internvl",
        vision_config={**VISION, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]},
        text_config=Qwen2Config(**TEXT),
        image_token_id=IDS["<IMG_CONTEXT>"],
        image_seq_length=16,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    pictures = GotOcr2ImageProcessorPil(**PICTURE, crop_to_patches=True, min_patches=1, max_patches=4)
    return config, InternVLProcessor(
        pictures, tokenizer(**named, video_token="<video>"), InternVLVideoProcessor(**PICTURE), image_seq_length=16
    )


def idefics(name):
    config = AutoConfig.for_model(
        name,
        vision_config={**VISION, "image_size": SIDE, "patch_size": PATCH},
        text_config=LlamaConfig(**TEXT),
        image_token_id=IDS["<image>"],
        scale_factor=2,
        pad_token_id=IDS["<pad>"],
    )
    sizes = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}, "do_image_splitting": True}
    return config, {**PICTURE, **sizes}


def idefics3():
    from transformers import Idefics3Processor
    from transformers.models.idefics3 import Idefics3ImageProcessorPil

    config, pictures = idefics("idefics3")
    return config, Idefics3Processor(Idefics3ImageProcessorPil(**pictures), tokenizer(), image_seq_len=16)


def smolvlm():
    from transformers import SmolVLMProcessor, SmolVLMVideoProcessor
    from transformers.models.smolvlm import SmolVLMImageProcessorPil

    config, pictures = idefics("smolvlm")
    named = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>"}
    named |= {"global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"}
    return config, SmolVLMProcessor(
        SmolVLMImageProcessorPil(**pictures), tokenizer(**named), SmolVLMVideoProcessor(), image_seq_len=16
    )


def gemma3():
    from transformers import Gemma3Processor
    from transformers.models.gemma3 import Gemma3ImageProcessorPil

    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    config = AutoConfig.for_model(
        "gemma3",
        vision_config=siglip(),
        text_config={**TEXT, "sliding_window": 512, "query_pre_attn_scalar": 32},
        mm_tokens_per_image=16,
        image_token_id=IDS["<image_soft_token>"],
        image_token_index=IDS["<image_soft_token>"],
        boi_token_index=IDS["<start_of_image>"],
        eoi_token_index=IDS["<end_of_image>"],
    )
    return config, Gemma3Processor(Gemma3ImageProcessorPil(**PICTURE), tokenizer(**named), image_seq_length=16)


PROMPTS = {
    "llava": "<image>",
    "llava_next": "<image>",
    "llava_onevision": "<image>",
    "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "internvl": "<IMG_CONTEXT>",
    "idefics3": "<image>",
    "smolvlm": "<image>",
    "gemma3": "<start_of_image>",
}


@torch.no_grad()
def write(family, folder, seed=0):
    """Save a tiny model and its processor."""
    config, processor = globals()[family]()
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for weight in model.parameters():
        if weight.ndim > 1:  # the usual start is too even for answers to depend on the picture
            weight.normal_(std=1.5 * weight[0].numel() ** -0.5)
    model.get_output_embeddings().weight[: len(SPECIAL)] = 0  # answers are words
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if family.startswith("llava"):
        name_for_all_readers(Path(folder) / "model.safetensors")
    return folder
