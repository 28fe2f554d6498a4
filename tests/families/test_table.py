"""Which image a visual token belongs to, and where in it, checked against how the inputs were made."""

import pytest
import torch
from tiny import EVERY, IMAGE, IMAGE_ID, TINY, VARIANTS, build, make_inputs
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from versions import ABSENT

from grip_hf import apply_grip
from grip_hf.errors import UnsupportedModelError
from grip_hf.families.layouts import grid_positions, run_index, within_run
from grip_hf.families.table import FAMILIES, find_parts
from grip_hf.families.tiles import newline_coordinates


def grid(height, width):
    """Centres of a grid in raster order, in [0, 1]."""
    return [((r + 0.5) / height, (c + 0.5) / width) for r in range(height) for c in range(width)]


# Per family, the positions of each picture of tests/support/tiny.py, alternating between its two shapes.
EXPECTED = {
    "llava": [grid(4, 4)] * 2,
    "llava_next": [grid(4, 4) + grid(4, 9), grid(4, 4) + grid(8, 5)],
    "llava_onevision": [grid(4, 4) + grid(4, 9), grid(4, 4) + grid(8, 5)],
    "qwen2_vl": [grid(2, 3), grid(3, 2)],
    "qwen2_5_vl": [grid(2, 3), grid(3, 2)],
    "internvl": [grid(2, 2), grid(2, 2) * 2],
    "smolvlm": [grid(2, 2) * 3] * 2,
    "idefics3": [grid(2, 2) * 3] * 2,
    "aria": [[(0.5, 0.5)] * 6] * 2,  # latents lie nowhere
    "aya_vision": [grid(2, 2), grid(2, 2) * 3],
    "cohere2_vision": [grid(2, 2), grid(2, 2) * 3],
    "deepseek_vl": [grid(4, 4)] * 2,
    "fast_vlm": [grid(4, 4)] * 2,
    "gemma3": [grid(2, 2)] * 2,
    "gemma3n": [grid(4, 4)] * 2,
    "perception_lm": [grid(2, 2), grid(2, 2) * 2],
    "gemma4": [grid(4, 1)] * 2,  # the width is not known
    "glm4v": [grid(2, 3), grid(3, 2)],
    "idefics2": [[(0.5, 0.5)] * 6] * 2,
    "janus": [grid(4, 4)] * 2,
    "llava_next_video": [grid(4, 4) + grid(4, 9), grid(4, 4) + grid(8, 5)],
    "mistral3": [grid(2, 3), grid(3, 2)],
    "ovis2": [grid(2, 2), grid(2, 2) * 3],
    "paligemma": [grid(4, 4)] * 2,
    "qwen3_vl": [grid(2, 3), grid(3, 2)],
    "qwen3_vl_moe": [grid(2, 3), grid(3, 2)],
    "video_llava": [grid(4, 4)] * 2,
    "vipllava": [grid(4, 4)] * 2,
    "ernie4_5_vl_moe": [grid(2, 3), grid(3, 2)],
    "exaone4_5": [grid(6, 1)] * 2,
    "glm46v": [grid(2, 3), grid(3, 2)],
    "glm4v_moe": [grid(2, 3), grid(3, 2)],
    "glm_ocr": [grid(2, 3), grid(3, 2)],
    "got_ocr2": [grid(2, 2), grid(2, 2) * 2],
    "lfm2_vl": [grid(6, 1)] * 2,
    "lighton_ocr": [grid(6, 1)] * 2,
    "molmo2": [grid(2, 2) + grid(1, 2)] * 2,
    "paligemma2": [grid(4, 4)] * 2,
    "qianfan_ocr": [grid(2, 2), grid(2, 2) * 2],
    "qwen3_5": [grid(2, 3), grid(3, 2)],
    "qwen3_5_moe": [grid(2, 3), grid(3, 2)],
    "video_llama_3": [grid(6, 1)] * 2,
}


def seen_by_selector(family, prompts, through_generate, **settings):
    """The VisualBatch that a selector gets."""
    batches = []

    def selector(batch):
        batches.append(batch)
        return batch.tokens.float().sum(-1)

    model, inputs = build(family), make_inputs(family, prompts)
    apply_grip(model, keep_ratio=0.5, selector=selector, **settings)
    with torch.no_grad():
        if through_generate:  # pictures are encoded beforehand and their sizes are not passed on
            model.generate(**inputs, max_new_tokens=2)
        else:
            model(**inputs)
    assert len(batches) == 1
    return model, inputs, batches[0]


@pytest.mark.parametrize("family", sorted(TINY))
@pytest.mark.parametrize("through_generate", [False, True])
def test_positions_and_images(family, through_generate):
    prompts = [[3, IMAGE, 4], [2, IMAGE, 2, IMAGE, 3], [5]]
    model, inputs, batch = seen_by_selector(family, prompts, through_generate)
    first, second = EXPECTED[family]
    for row, pictures in enumerate([[first], [first, second]]):
        real = batch.mask[row]
        expected = torch.tensor([place for picture in pictures for place in picture])
        torch.testing.assert_close(batch.positions[row][real], expected)
        assert batch.image_index[row][real].tolist() == [i for i, one in enumerate(pictures) for _ in one]
    assert batch.budgets.tolist() == [int(n * 0.5 + 0.5) for n in batch.mask.sum(1).tolist()]
    # The text is the prompt without pictures and padding, embedded by the model's own table.
    table = model.get_input_embeddings()
    if family == "ovis2":
        return  # which puts features of its own in the place of indicator tokens
    for row in range(2):
        words = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        words = words[words != IMAGE_ID]
        assert torch.equal(batch.text[row][batch.text_mask[row]], table(words))
    assert not batch.text[~batch.text_mask].any() and not batch.tokens[~batch.mask].any()


@pytest.mark.parametrize("family", sorted(TINY))
def test_a_budget_per_image(family):
    _, _, batch = seen_by_selector(family, [[2, IMAGE, 2, IMAGE, 3]], False, scope="image")
    assert batch.mask.sum(1).tolist() == [len(one) for one in EXPECTED[family]]
    assert batch.image_index[batch.mask].tolist() == [i for i, one in enumerate(EXPECTED[family]) for _ in one]


def test_runs():
    visual = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1]]).bool()
    assert run_index(visual)[visual].tolist() == [0, 0, 1, 2, 2]
    assert within_run(visual)[visual].tolist() == [0, 1, 0, 0, 1]


def test_leading_cls_lies_in_the_middle():
    positions = grid_positions(torch.arange(5), 5)
    assert positions.tolist() == [[0.5, 0.5], [0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]]


def test_newline_images_that_adjoin():
    """Two pictures without text between them, and one cut down to its base picture with a single newline."""
    pictures = [(2, 3), (1, 4), None]  # grid rows and columns, newline column included
    newline, image = [], []
    for number, one in enumerate(pictures):
        rows, columns = one or (1, 1)
        mine = [False] * 4 + ([False] * (columns - 1) + [True]) * rows
        newline += mine
        image += [number] * len(mine)
    visual = torch.ones(1, len(newline)).bool()
    found, positions = newline_coordinates(visual, torch.tensor([newline]), 4)
    assert found[0].tolist() == image
    expected = [*grid(2, 2), *grid(2, 3), *grid(2, 2), *grid(1, 4), *grid(2, 2), (0.5, 0.5)]
    torch.testing.assert_close(positions[0], torch.tensor(expected))


@pytest.mark.parametrize(
    "model",
    [
        LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)),
        BertModel(BertConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)),
        torch.nn.Linear(1, 1),
        "llava-hf/llava-1.5-7b-hf",
    ],
    ids=["text", "encoder", "module", "name"],
)
def test_unsupported_models_name_the_supported_ones(model):
    with pytest.raises(UnsupportedModelError, match=r"llava_next.*qwen2_vl"):
        apply_grip(model, keep_ratio=0.5)
    assert not hasattr(model, "grip")


@pytest.mark.parametrize("name", ["mllama", "blip-2", "florence2", "llama4"])
def test_families_of_another_build_are_refused(name):
    """Cross-attention, a language model that generates by itself, an encoder-decoder, a head inside the decoder."""
    config = AutoConfig.for_model(name)
    config.get_text_config().num_hidden_layers = config.vision_config.num_hidden_layers = 1
    with torch.device("meta"):  # the real sizes, without memory
        model = AutoModelForImageTextToText.from_config(config)
    with pytest.raises(UnsupportedModelError, match=f"type '{name}'.*supported model types: .*llava"):
        apply_grip(model, keep_ratio=0.5, selector="grid")
    assert not hasattr(model, "grip")


def test_vision_tower_alone_is_refused():
    model = build("llava")
    model.model.vision_tower.config.model_type = "llava"
    with pytest.raises(UnsupportedModelError, match="no module 'language_model'"):
        find_parts(model.model.vision_tower)


def test_every_family_has_a_tiny_model():
    assert set(FAMILIES) == set(EVERY) - set(VARIANTS) and set(EVERY) == set(EXPECTED)


def test_families_that_are_absent_are_those_that_transformers_lacks():
    assert {name for name in FAMILIES if name not in CONFIG_MAPPING} == ABSENT == set(EVERY) - set(TINY)


@pytest.mark.parametrize("family", sorted(TINY))
def test_parts_are_found_from_the_whole_and_the_base_model(family):
    model = build(family)
    parts = find_parts(model)
    assert parts.owner is model and parts.base is model.model
    assert parts.language_model is model.model.get_decoder()
    assert find_parts(model.model).base is model.model
    assert IMAGE_ID in parts.token_ids
