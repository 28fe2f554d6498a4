"""A tiny LLaVA that speaks the pocket vocabulary, with 16 visual tokens, and things to train on."""

import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from grip_hf.frozen.data import DatasetExamples
from grip_hf.frozen.store import SampleStore
from grip_hf.frozen.vlm import FrozenVLM
from grip_hf.pocket.model import build_processor
from grip_hf.pocket.testbeds import POCKET
from grip_hf.pocket.vocabulary import vocabulary
from grip_hf.scorer.model import GripScorer, GripScorerConfig

TOKENS, HIDDEN = 16, 16
ANSWERS = ("yes", "no", "red", "top left", "c a t")


def build_vlm(seed=0, width=HIDDEN):
    """The model and its processor: 192 x 192 pixels in patches of 48."""
    torch.manual_seed(seed)
    ids = {token: i for i, token in enumerate(vocabulary())}
    vision = CLIPVisionConfig(
        image_size=192,
        patch_size=48,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    text = LlamaConfig(
        vocab_size=len(ids),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.5,
        max_position_embeddings=128,
        bos_token_id=ids["<s>"],
        eos_token_id=ids["</s>"],
        pad_token_id=ids["<pad>"],
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids["<image>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.update(eos_token_id=ids["</s>"], pad_token_id=ids["<pad>"], bos_token_id=ids["<s>"])
    with torch.no_grad():  # visual tokens of the size of words, so that they matter
        model.model.multi_modal_projector.linear_2.weight.normal_(std=2)
    processor = build_processor(POCKET)
    processor.patch_size = 48
    return model.eval(), processor


def picture(seed):
    """A picture of coloured noise."""
    pixels = torch.randint(0, 256, (12, 12, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((192, 192), Image.Resampling.NEAREST)


def rows(count=8):
    """Rows of a dataset; every two share a picture."""
    questions = ("is there any cat", "which colour is behind the dog", "in which corner is the bus")
    return [
        {"image": picture(i // 2), "prompt": questions[i % 3], "answer": ANSWERS[i % 5], "kind": f"k{i}"}
        for i in range(count)
    ]


def make_store(count=8, seed=0):
    """A store over `rows`."""
    return SampleStore(FrozenVLM(*build_vlm(seed)), DatasetExamples(rows(count)))


def make_scorer(seed=0, **sizes):
    """A small scorer with scores that are far from flat."""
    torch.manual_seed(seed)
    config = {"width": 16, "attention_width": 16, "num_heads": 2, "num_layers": 1} | sizes
    scorer = GripScorer(GripScorerConfig(hidden_size=HIDDEN, **config))
    with torch.no_grad():
        for name, weight in scorer.named_parameters():
            if name.startswith("head"):
                weight.mul_(4)
    return scorer.eval()
