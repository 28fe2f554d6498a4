"""The pocket LLaVA: stock transformers classes at a size that two CPU cores can train and run."""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip import CLIPImageProcessorPil

from grip_hf.pocket.places import IMAGE_SIZE, PATCH_SIZE
from grip_hf.pocket.vocabulary import vocabulary

WEIGHTS = Path(__file__).parent / "assets" / "model"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] + ' ' }}"
    "{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def load_pocket_llava(dtype: torch.dtype = torch.float32) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load the shipped pocket LLaVA and its processor. Needs no network.

    Args:
        dtype: Floating-point type of the weights; they are stored as bfloat16.

    Returns:
        The model in evaluation mode, and the processor for pictures and questions: `"<image>" + question`.

    Raises:
        FileNotFoundError: If the package was installed without its data.
    """
    if not (WEIGHTS / "model.safetensors").is_file():
        raise FileNotFoundError(f"the pocket model's weights are missing from {WEIGHTS}; reinstall grip-hf")
    model = LlavaForConditionalGeneration.from_pretrained(WEIGHTS, dtype=dtype, local_files_only=True)
    return model.eval(), LlavaProcessor.from_pretrained(WEIGHTS, local_files_only=True)


def build_processor() -> LlavaProcessor:
    """Build the stock processor: one token a word, letters as tokens, pictures of 192 x 192 pixels."""
    ids = {token: i for i, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[?!.,:;]"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    pictures = CLIPImageProcessorPil(
        size=size, crop_size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=fast,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def build_model(seed: int = 0) -> LlavaForConditionalGeneration:
    """Build the untrained pocket LLaVA: CLIP tower of 5 layers x 160, Llama of 4 layers x 192."""
    torch.manual_seed(seed)
    ids = {token: i for i, token in enumerate(vocabulary())}
    vision = CLIPVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=5,
        projection_dim=160,
    )
    text = LlamaConfig(
        vocab_size=len(ids),
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        bos_token_id=ids["<s>"],
        eos_token_id=ids["</s>"],
        pad_token_id=ids["<pad>"],
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids["<image>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        multimodal_projector_bias=True,
    )
    model = LlavaForConditionalGeneration(config)
    _initialise(model)
    model.generation_config.update(bos_token_id=ids["<s>"], eos_token_id=ids["</s>"], pad_token_id=ids["<pad>"])
    return model


@torch.no_grad()
def _initialise(model: LlavaForConditionalGeneration) -> None:
    """Start words and projected visual tokens at one scale, and layer 1 as a matcher of like with like."""
    language = model.model.language_model
    width = language.config.hidden_size
    language.embed_tokens.weight.normal_()
    language.norm.weight.fill_(width**-0.5)  # logits of unit scale beside embeddings of unit scale
    matcher = language.layers[1].self_attn
    matcher.q_proj.weight.normal_(std=1.5 * width**-0.5)
    matcher.k_proj.weight.copy_(matcher.q_proj.weight)
    for layer in language.layers:
        for linear in (*layer.self_attn.children(), *layer.mlp.children()):
            if isinstance(linear, torch.nn.Linear) and linear not in (matcher.q_proj, matcher.k_proj):
                linear.weight.normal_(std=linear.in_features**-0.5)
        for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
            last.weight.mul_((2 * len(language.layers)) ** -0.5)
    projector = model.model.multi_modal_projector
    for linear in (projector.linear_1, projector.linear_2):
        linear.weight.normal_(std=1.5 * linear.in_features**-0.5)
