"""A checkpoint of random weights in a LLaVA's shape, with a processor, a tokenizer and a scorer, for vLLM to serve."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip import CLIPImageProcessorPil

from grip_hf import GripScorer, apply_grip
from grip_hf.errors import ConfigError
from grip_hf.evaluation.shapes import Shape, build_shape
from grip_hf.pocket.model import CHAT_TEMPLATE
from grip_hf.pocket.names import name_for_all_readers
from grip_hf.scorer import GripScorerConfig


def write_checkpoint(shape: Shape, folder: Path, dtype: torch.dtype, seed: int = 0) -> None:
    """Write model, processor and GRIP part.

    Raises:
        ConfigError: It is no LLaVA's shape.
    """
    if shape.family != "llava":
        raise ConfigError(f"only shapes of LLaVA can be served here, not {shape.family!r}")
    model = build_shape(shape, "cpu", dtype, seed=seed)
    model.config.architectures = ["LlavaForConditionalGeneration"]
    scorer = GripScorer(GripScorerConfig(hidden_size=shape.text["hidden_size"]))
    apply_grip(model, scorer=scorer, keep_ratio=0.5)
    model.save_pretrained(folder)  # with its GRIP part
    name_for_all_readers(folder / "model.safetensors")
    build_processor(shape).save_pretrained(folder)


def build_processor(shape: Shape) -> LlavaProcessor:
    """A processor whose words are w0, w1, ..."""
    vocabulary = shape.text["vocab_size"]
    ids = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>"])}
    ids |= {f"w{number}": number for number in range(3, vocabulary - 1)} | {"<image>": vocabulary - 1}
    words = Tokenizer(WordLevel(ids, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        model_input_names=["input_ids", "attention_mask"],
    )
    side = {"height": shape.vision["image_size"], "width": shape.vision["image_size"]}
    pictures = CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False)
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=fast,
        patch_size=shape.vision["patch_size"],
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )
