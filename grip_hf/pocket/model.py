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

from grip_hf.pocket.names import name_for_all_readers
from grip_hf.pocket.places import PATCH_SIZE
from grip_hf.pocket.testbeds import DEFAULT, POCKET, Testbed, get_testbed

WEIGHTS = DEFAULT.weights
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] + ' ' }}"
    "{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


SHAPES = {  # tower and language model of each testbed: width, width of the MLP, layers, heads
    "pocket": ((160, 640, 5, 5), (192, 576, 4, 6)),
    "pocket2": ((256, 1024, 6, 8), (256, 768, 6, 8)),
}


def load_pocket(
    testbed: str = DEFAULT.name, dtype: torch.dtype = torch.float32
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load the shipped model of a testbed and its processor. Needs no network.

    Args:
        testbed: "pocket" (144 visual tokens) or "pocket2" (256 visual tokens).
        dtype: Floating-point type of the weights; they are stored as bfloat16.

    Returns:
        The model in evaluation mode, and the processor for pictures and questions: `"<image>" + question`.

    Raises:
        ValueError: There is no such testbed.
        FileNotFoundError: The package was installed without its data.
    """
    folder = get_testbed(testbed).weights
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"the pocket model's weights are missing from {folder}; reinstall grip-hf")
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.eval(), LlavaProcessor.from_pretrained(folder, local_files_only=True)


def load_pocket_llava(dtype: torch.dtype = torch.float32) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load the pocket LLaVA of the default testbed; see `load_pocket`."""
    return load_pocket(DEFAULT.name, dtype)


def save_pocket(model: LlavaForConditionalGeneration, testbed: Testbed, folder: Path) -> None:
    """Write model (as bfloat16, which it then is) and processor, with names that every reader knows."""
    model.bfloat16().save_pretrained(folder)
    name_for_all_readers(folder / "model.safetensors")
    build_processor(testbed).save_pretrained(folder)


def build_processor(testbed: Testbed = DEFAULT) -> LlavaProcessor:
    """Build the stock processor: one token a word, letters as tokens, pictures of the testbed's size."""
    ids = {token: i for i, token in enumerate(testbed.words)}
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
    size = {"height": testbed.image_size, "width": testbed.image_size}
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


def build_model(seed: int = 0, testbed: Testbed = DEFAULT) -> LlavaForConditionalGeneration:
    """Build the untrained LLaVA of a testbed: a CLIP tower and a Llama of the widths and depths in `SHAPES`.

    The first one's output layer is tied to its word embeddings. The second one's is not, as in LLaVA-1.5.
    """
    torch.manual_seed(seed)
    ids = {token: i for i, token in enumerate(testbed.words)}
    seeing, speaking = SHAPES[testbed.name]
    tied = testbed is POCKET
    vision = CLIPVisionConfig(
        image_size=testbed.image_size,
        patch_size=PATCH_SIZE,
        hidden_size=seeing[0],
        intermediate_size=seeing[1],
        num_hidden_layers=seeing[2],
        num_attention_heads=seeing[3],
        projection_dim=seeing[0],
    )
    text = LlamaConfig(
        vocab_size=len(ids),
        hidden_size=speaking[0],
        intermediate_size=speaking[1],
        num_hidden_layers=speaking[2],
        num_attention_heads=speaking[3],
        num_key_value_heads=speaking[3],
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        bos_token_id=ids["<s>"],
        eos_token_id=ids["</s>"],
        pad_token_id=ids["<pad>"],
        tie_word_embeddings=tied,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids["<image>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=tied,
        multimodal_projector_bias=True,
    )
    model = LlavaForConditionalGeneration(config)
    _initialise(model, tied)
    model.generation_config.update(bos_token_id=ids["<s>"], eos_token_id=ids["</s>"], pad_token_id=ids["<pad>"])
    return model


@torch.no_grad()
def _initialise(model: LlavaForConditionalGeneration, tied: bool) -> None:
    """Start words and projected visual tokens at one scale; with tied words layer 1 as a matcher of like with like."""
    language = model.model.language_model
    width = language.config.hidden_size
    language.embed_tokens.weight.normal_()
    matcher = language.layers[1].self_attn
    special = (matcher.q_proj, matcher.k_proj) if tied else ()
    if tied:
        language.norm.weight.fill_(width**-0.5)  # logits of unit scale beside embeddings of unit scale
        matcher.q_proj.weight.normal_(std=1.5 * width**-0.5)
        matcher.k_proj.weight.copy_(matcher.q_proj.weight)
    else:
        model.lm_head.weight.normal_(std=width**-0.5)
    for layer in language.layers:
        for linear in (*layer.self_attn.children(), *layer.mlp.children()):
            if isinstance(linear, torch.nn.Linear) and linear not in special:
                linear.weight.normal_(std=linear.in_features**-0.5)
        for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
            last.weight.mul_((2 * len(language.layers)) ** -0.5)
    projector = model.model.multi_modal_projector
    for linear in (projector.linear_1, projector.linear_2):
        linear.weight.normal_(std=1.5 * linear.in_features**-0.5)
