"""Image down-sampling against the steps done by hand."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from versions import TRAINING

from grip_hf.errors import ConfigError, UnsupportedModelError
from grip_hf.evaluation.downsampling import downsample, enlarge, middle_patches, pool

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


@pytest.mark.parametrize("prompt", PROMPTS)
def test_pooled_logits_are_those_of_averaged_features(prompt):
    """4 x 4 features averaged by hand over 2 x 2 cells, before the projector, at the positions of their middles."""
    model = tiny.build("llava")
    inputs = tiny.make_inputs("llava", [prompt])
    with torch.no_grad():
        found = model(**pool(model, inputs, 7)).logits[0]
        states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        pictures = []
        for features in states[-1][:, 1:]:
            cells = []
            for row in (0, 2):
                for column in (0, 2):
                    under = [4 * r + c for r in (row, row + 1) for c in (column, column + 1)]
                    cells.append(sum(features[i] for i in under) / 4)
            pictures.append(model.model.multi_modal_projector(torch.stack(cells)[None])[0])
        embeds, places, images, i = [], [], iter(pictures), 0
        ids = inputs["input_ids"][0].tolist()
        while i < len(ids):
            if ids[i] != tiny.IMAGE_ID:
                embeds.append(model.get_input_embeddings()(torch.tensor(ids[i])))
                places.append(i)
                i += 1
                continue
            for cell, feature in enumerate(next(images)):
                row, column = (2 * axis + 1 for axis in divmod(cell, 2))
                embeds.append(feature)
                places.append(i + 4 * row + column)
            i += 16
        reference = model.model.language_model(
            inputs_embeds=torch.stack(embeds)[None], position_ids=torch.tensor([places])
        )
        expected = model.lm_head(reference.last_hidden_state)[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert not model.model.multi_modal_projector._forward_pre_hooks


def test_an_enlarged_picture_is_the_small_one_at_full_size():
    model = tiny.build("llava")
    inputs = tiny.make_inputs("llava", PROMPTS)
    found = enlarge(model, inputs, 5)  # 2 x 2 patches of 4 pixels
    assert {name for name in inputs if found[name] is not inputs[name]} == {"pixel_values"}
    for picture, mine in zip(inputs["pixel_values"], found["pixel_values"], strict=True):
        small = F.interpolate(picture[None], (8, 8), mode="bilinear", antialias=True)[0]
        assert mine.shape == picture.shape and not torch.equal(mine, picture)
        for row in range(16):
            for column in range(16):
                # A pixel's middle lies at (i + 0.5) / 2 - 0.5 of the small picture; beyond its rim the rim counts.
                y, x = (min(max((i + 0.5) / 2 - 0.5, 0), 7) for i in (row, column))
                top, left = int(y), int(x)
                down, right = min(top + 1, 7), min(left + 1, 7)
                v, u = y - top, x - left
                expected = (1 - v) * ((1 - u) * small[:, top, left] + u * small[:, top, right])
                expected = expected + v * ((1 - u) * small[:, down, left] + u * small[:, down, right])
                torch.testing.assert_close(mine[:, row, column], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(enlarge(model, inputs, 16)["pixel_values"], inputs["pixel_values"])


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
            for shrink in (downsample, pool, enlarge):
                found = model(**shrink(model, inputs, num_tokens)).logits
                torch.testing.assert_close(found, model(**inputs).logits)


def test_middle_patches():
    assert middle_patches(torch.arange(-1, 9), 3, 24).tolist() == [
        -1,
        *(24 * r + c for r in (4, 12, 20) for c in (4, 12, 20)),
    ]


def test_bad_arguments():
    model = tiny.build("llava")
    inputs = tiny.make_inputs("llava", PROMPTS[:1])
    for shrink in (downsample, pool, enlarge):
        with pytest.raises(ConfigError, match="num_tokens must be an integer >= 1, got 0"):
            shrink(model, inputs, 0)
    with pytest.raises(ConfigError, match="positions must be 'original' or 'compact', got 'none'"):
        downsample(model, inputs, 4, "none")
    with pytest.raises(UnsupportedModelError, match=r"needs a LLaVA model .* this 'qwen2_vl' model"):
        downsample(tiny.build("qwen2_vl"), inputs, 4)
