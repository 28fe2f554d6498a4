"""Videos: their tokens are pruned like those of pictures."""

import pytest
import torch
from tiny import VIDEO_ID, build, select_by_content

from grip_hf import apply_grip, remove_grip

FRAMES = 2
GRID = (FRAMES, 4, 4)  # of Qwen's patches; 2 x 2 are merged


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def run(count):
    return [VIDEO_ID] * count


def qwen(ids):
    def make():
        arguments = {"pixel_values_videos": random(FRAMES * 16, 96), "video_grid_thw": torch.tensor([GRID])}
        return arguments, ids

    return make


def frames(tokens):
    return lambda: ({"pixel_values_videos": random(1, FRAMES, 3, 16, 16)}, run(tokens))


# Arguments of a video and the tokens that stand for it.
VIDEOS = {
    "qwen2_vl": qwen([92, *run(8), 93]),
    "qwen2_5_vl": qwen([92, *run(8), 93]),
    "qwen3_vl": qwen([92, *run(4), 93, 20, 92, *run(4), 93]),  # frames apart, with times between them
    "llava_onevision": frames(FRAMES * 4 + 1),  # 2 x 2 pooled, and a newline at the end
    "llava_next_video": frames(FRAMES * 4),
    "video_llava": frames(FRAMES * 17),  # each frame with its [CLS]
}


def make_inputs(family):
    arguments, ids = VIDEOS[family]()
    ids = torch.tensor([[5, 6, *ids, 7, 8, 9]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **arguments}
    if family.startswith("qwen"):
        inputs["mm_token_type_ids"] = torch.where(ids == VIDEO_ID, 2, 0).int()
    return inputs


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", sorted(VIDEOS))
def test_half_of_a_video_equals_the_masked_model(family, attention):
    model, inputs = build(family, attention), make_inputs(family)
    seen = []

    def selector(batch):
        seen.append(batch)
        return select_by_content(batch)

    with torch.no_grad():
        full = model(**inputs).logits
        apply_grip(model, keep_ratio=0.5, selector=selector)
        out = model(**inputs)
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, -4:]
        uncached = model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=False)[:, -4:]
        kept = model.grip.kept_tokens(out)[0]
        remove_grip(model)
        held = inputs["attention_mask"].clone()
        places = (inputs["input_ids"][0] == VIDEO_ID).nonzero().flatten()
        held[0, places] = 0
        held[0, places[kept]] = 1
        positions = torch.arange(held.shape[1])[None]
        if family.startswith("qwen"):
            grid = {"video_grid_thw": inputs["video_grid_thw"], "attention_mask": inputs["attention_mask"]}
            positions = model.model.get_rope_index(inputs["input_ids"], inputs["mm_token_type_ids"], **grid)[0]
        expected = model(**{**inputs, "attention_mask": held}, position_ids=positions).logits
    stays = held.bool()
    assert len(kept) == int(len(places) * 0.5 + 0.5)
    torch.testing.assert_close(out.logits[stays], expected[stays], atol=2e-5, rtol=1e-4)
    assert (out.logits - full)[stays].abs().max() > 1e-2
    assert torch.equal(tokens, uncached) and int(tokens[0, 0]) == int(expected[0, -1].argmax())
    positions = seen[0].positions[seen[0].mask]
    assert bool(((positions >= 0) & (positions <= 1)).all())
