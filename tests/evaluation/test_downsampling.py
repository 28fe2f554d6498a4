"""Image down-sampling against the steps done by hand."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from versions import TRAINING

from grip_hf.errors import ConfigError, UnsupportedModelError
from grip_hf.evaluation.downsampling import downsample, middle_patches

pytestmark = TRAINING

PROMPTS = [[3, tiny.IMAGE, 4], [tiny.IMAGE, 2, tiny.IMAGE, 3, 5]]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(("num_tokens", "side"), [(1, 1), (8, 2), (10, 3)])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_logits_are_those_of_the_small_picture(prompt, num_tokens, side, positions):
    model = tiny.build("llava")
    inputs = tiny.make_inputs("llava", [prompt])
    with torch.no_grad():
        found = model(**downsample(model, inputs, num_tokens, positions)).logits[0]
        small = F.interpolate(inputs["pixel_values"], (4 * side, 4 * side), mode="bilinear", antialias=True)
        states = model.model.vision_tower(
            small, interpolate_pos_encoding=True, output_hidden_states=True
        ).hidden_states
        features = model.model.multi_modal_projector(states[-1][:, 1:])
        embeds, places, images, i = [], [], iter(features), 0
        ids = inputs["input_ids"][0].tolist()
        while i < len(ids):
            if ids[i] != tiny.IMAGE_ID:
                embeds.append(model.get_input_embeddings()(torch.tensor(ids[i])))
                places.append(i)
                i += 1
                continue
            for cell, feature in enumerate(next(images)):
                row, column = (int((axis + 0.5) * 4 / side) for axis in divmod(cell, side))
                embeds.append(feature)
                places.append(i + 4 * row + column)
            i += 16
        if positions == "compact":
            places = range(len(embeds))
        reference = model.model.language_model(
            inputs_embeds=torch.stack(embeds)[None], position_ids=torch.tensor([list(places)])
        )
        expected = model.lm_head(reference.last_hidden_state)[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_a_batch_equals_its_rows():
    model = tiny.build("llava")
    together = downsample(model, tiny.make_inputs("llava", PROMPTS), 4)
    with torch.no_grad():
        batch = model(**together).logits
        for row, prompt in enumerate(PROMPTS):
            alone = model(**downsample(model, tiny.make_inputs("llava", [prompt]), 4)).logits[0]
            torch.testing.assert_close(batch[row, -len(alone) :], alone, atol=1e-4, rtol=1e-3)
    assert together["attention_mask"].sum(1).tolist() == [7 + 4, 10 + 8]


def test_full_size_is_the_plain_model():
    model = tiny.build("llava")
    inputs = tiny.make_inputs("llava", PROMPTS[:1])
    with torch.no_grad():
        for num_tokens in (16, 99):
            found = model(**downsample(model, inputs, num_tokens)).logits
            torch.testing.assert_close(found, model(**inputs).logits)


def test_middle_patches():
    assert middle_patches(torch.arange(-1, 9), 3, 24).tolist() == [
        -1,
        *(24 * r + c for r in (4, 12, 20) for c in (4, 12, 20)),
    ]


def test_bad_arguments():
    model = tiny.build("llava")
    inputs = tiny.make_inputs("llava", PROMPTS[:1])
    with pytest.raises(ConfigError, match="num_tokens must be an integer >= 1, got 0"):
        downsample(model, inputs, 0)
    with pytest.raises(ConfigError, match="positions must be 'original' or 'compact', got 'none'"):
        downsample(model, inputs, 4, "none")
    with pytest.raises(UnsupportedModelError, match=r"needs a LLaVA model .* this 'qwen2_vl' model"):
        downsample(tiny.build("qwen2_vl"), inputs, 4)
