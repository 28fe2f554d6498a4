"""Videos: their tokens are pruned like those of pictures."""

import pytest
import torch
from matrix import VIDEO, lacking
from reference import assert_close, reference_logits
from tiny import IMAGE_ID, TINY, VIDEO_ID, build, select_by_content
from versions import ABSENT, FLAT_FRAMES

from grip_hf import apply_grip, remove_grip

FRAMES = 2
GRID = torch.tensor([(FRAMES, 4, 4)])  # of patches; 2 x 2 are merged


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def run(count, token=VIDEO_ID):
    return [token] * count


def frames_apart(token=VIDEO_ID, start=(92,), end=(93,)):
    """Two frames with a time between them."""
    frame = [*start, *run(4, token), *end]
    return [*frame, 20, *frame]


def grid(ids, width=96, **more):
    def make():
        return {"pixel_values_videos": random(FRAMES * 16, width), "video_grid_thw": GRID, **more}, ids

    return make


def frames(tokens):
    return lambda: ({"pixel_values_videos": random(1, FRAMES, 3, 16, 16)}, run(tokens))


def gemma4():
    places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).reshape(1, 16, 2)
    arguments = {
        "pixel_values_videos": random(FRAMES, 16, 48),
        "video_position_ids": places.expand(FRAMES, -1, -1),
        "num_frames_per_video": torch.tensor([FRAMES]),
    }
    if not FLAT_FRAMES:
        arguments = {name: value[None] for name, value in arguments.items() if name != "num_frames_per_video"}
    return arguments, frames_apart()


def molmo2():
    arguments = {
        "pixel_values_videos": random(FRAMES, 16, 48),
        "video_token_pooling": torch.arange(16 * FRAMES).reshape(-1, 4),
        "video_grids": torch.tensor([[FRAMES, 2, 2]]),
    }
    return arguments, frames_apart(IMAGE_ID, (96,), (97,))


GLM = grid([94, *frames_apart(IMAGE_ID), 95])
# Arguments of a video and the tokens that stand for it.
VIDEOS = {
    "ernie4_5_vl_moe": grid([94, *run(4), 95], 48),  # two frames make a token
    "exaone4_5": grid([92, *run(8), 93]),
    "gemma4": gemma4,
    "glm46v": GLM,
    "glm4v": GLM,
    "glm4v_moe": GLM,
    "glm_ocr": GLM,
    "llava_next_video": frames(FRAMES * 4),
    "llava_onevision": frames(FRAMES * 4 + 1),  # 2 x 2 pooled, and a newline at the end
    "molmo2": molmo2,
    "perception_lm": lambda: ({"pixel_values_videos": random(FRAMES, 1, 3, 16, 16)}, run(FRAMES * 4)),
    "qwen2_5_vl": grid([92, *run(8), 93]),
    "qwen2_vl": grid([92, *run(8), 93]),
    "qwen3_5": grid(frames_apart()),
    "qwen3_5_moe": grid(frames_apart()),
    "qwen3_vl": grid(frames_apart()),
    "qwen3_vl_moe": grid(frames_apart()),
    "video_llama_3": grid(run(8), 48, video_merge_sizes=torch.tensor([2])),
    "video_llava": frames(FRAMES * 17),  # each frame with its [CLS]
}
# What `mm_token_type_ids` calls a video; it may have the placeholders of pictures.
KINDS = {
    "ernie4_5_vl_moe": 2,
    "gemma4": 2,
    "molmo2": 1,
    **{name: 2 for name in VIDEOS if name.startswith(("qwen", "glm"))},
}
SLOW = {
    "ernie4_5_vl_moe",
    "glm46v",
    "glm4v_moe",
    "glm_ocr",
    "qwen3_5_moe",
    "qwen3_vl_moe",
    "exaone4_5",
    "molmo2",
    "video_llama_3",
}


def test_the_matrix_names_them():
    assert set(VIDEO) == set(VIDEOS)


def make_inputs(family):
    arguments, ids = VIDEOS[family]()
    ids = torch.tensor([[5, 6, *ids, 7, 8, 9]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **arguments}
    if family in KINDS:
        inputs["mm_token_type_ids"] = torch.where(video_mask(inputs), KINDS[family], 0).int()
    return inputs


def video_mask(inputs):
    return (inputs["input_ids"] == VIDEO_ID) | (inputs["input_ids"] == IMAGE_ID)


def original_positions(model, inputs):
    """Position ids of the unpruned call."""
    if "video_grid_thw" not in inputs or not hasattr(model.model, "get_rope_index"):
        return torch.arange(inputs["input_ids"].shape[1])[None]
    call = {name: inputs[name] for name in ("input_ids", "mm_token_type_ids", "video_grid_thw", "attention_mask")}
    return model.model.get_rope_index(**call)[0]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else []) for name in sorted(set(VIDEOS) - ABSENT)],
)
def test_half_of_a_video_equals_the_masked_model(family, attention):
    model, inputs = build(family, attention), make_inputs(family)
    if lacking("video", family, lambda: model(**inputs)):
        return
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
        places = video_mask(inputs)[0].nonzero().flatten()
        stays = inputs["attention_mask"].bool()
        stays[0, places] = False
        stays[0, places[kept]] = True
        expected = reference_logits(model, inputs, stays, original_positions(model, inputs))
    assert len(kept) == int(len(places) * 0.5 + 0.5)
    assert_close(family, out.logits[stays], expected[stays])
    assert (out.logits - full)[stays].abs().max() > 1e-2
    assert torch.equal(tokens, uncached) and int(tokens[0, 0]) == int(expected[0, -1].argmax())
    assert int(seen[0].image_index[seen[0].mask].min()) == 0
    positions = seen[0].positions[seen[0].mask]
    assert bool(((positions >= 0) & (positions <= 1)).all())


MIXED = ("llava_onevision", "llava_next_video", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "video_llava", "exaone4_5")


@pytest.mark.parametrize("scope", ["sample", "image"])
@pytest.mark.parametrize(
    "family", [pytest.param(one, marks=pytest.mark.slow if one in SLOW else []) for one in MIXED if one not in ABSENT]
)
def test_a_picture_and_a_video_in_one_prompt(family, scope):
    """Both are pruned, and the rest equals the masked model; a budget is shared by them, or each has its own."""
    arguments, ids = VIDEOS[family]()
    pixels, (picture,) = TINY[family].pictures(1, 0)
    ids = torch.tensor([[5, 6, *picture, 7, *ids, 8, 9]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels, **arguments}
    if family in KINDS:
        kinds = torch.where(ids == IMAGE_ID, 1, 0)
        inputs["mm_token_type_ids"] = torch.where(ids == VIDEO_ID, KINDS[family], kinds).int()
    model = build(family)
    positions = torch.arange(ids.shape[1])[None]
    if "video_grid_thw" in inputs and hasattr(model.model, "get_rope_index"):
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
        positions = model.model.get_rope_index(**{name: inputs[name] for name in names})[0]
    with torch.no_grad():
        apply_grip(model, keep_ratio=0.5, selector=select_by_content, scope=scope)
        logits = model(**inputs).logits
        stays, images = model.grip.last.held, ids[0] == IMAGE_ID
        videos = ids[0] == VIDEO_ID
        expected = reference_logits(remove_grip(model), inputs, stays, positions)
    assert_close(family, logits[stays], expected[stays])
    count = [int((stays[0] & one).sum()) for one in (images, videos)]
    total = [int(images.sum()), int(videos.sum())]
    assert total[0] and total[1]
    if scope == "sample":
        assert sum(count) == int(sum(total) * 0.5 + 0.5)
    else:
        assert all(0 < here < there for here, there in zip(count, total, strict=True))
        assert abs(sum(count) - sum(total) / 2) <= FRAMES + 1
