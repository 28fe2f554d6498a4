"""Rows that leave the vision tower, per family, against the unpatched tower with those rows masked out."""

import math

import pytest
import torch
from matrix import every_family, refused
from reference import assert_close, held_positions, original_positions, reference_logits, visual_mask
from tiny import IMAGE, IMAGE_ID, VARIANTS, VIDEO_ID, build, make_inputs, select_by_content
from tower_reference import build_deep, by_content, masked_tower, watched

from grip_hf import apply_grip, remove_grip
from grip_hf.errors import UnsupportedModelError
from grip_hf.tower.facts import ROWS

CHECK = "drops in the tower"
# Batches of one size, tiles with newlines, pixel shuffle, windows, deepstack, patches of padded pictures.
FAST = ("llava", "llava_next", "internvl", "qwen2_5_vl", "qwen3_vl", "lfm2_vl")
PROMPTS = {"one row": [[3, IMAGE, 4]], "unequal rows": [[3, IMAGE, 4], [2, IMAGE, 2, IMAGE, 3], [5]]}
TOWER = {"tower_keep_ratio": 0.5, "tower_selector": by_content}


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("rows", PROMPTS)
@every_family(fast=FAST)
def test_dropped_rows_equal_the_masked_tower(family, rows):
    model, inputs = build_deep(family), make_inputs(family, PROMPTS[rows])
    if refused(CHECK, family):
        with pytest.raises(UnsupportedModelError, match="tower_keep_ratio needs a vision tower"):
            apply_grip(model, keep_ratio=0.25, **TOWER)
        assert not hasattr(model, "grip")
        return
    plain = model(**inputs).logits
    apply_grip(model, keep_ratio=0.25, selector=select_by_content, **TOWER)
    with watched() as plans:
        out = model(**inputs, use_cache=True)
    kept, last = model.grip.kept_tokens(out), model.grip.last
    remove_grip(model)
    assert torch.equal(plain, model(**inputs).logits)

    held = held_positions(inputs, kept)
    with masked_tower(model, plans) as dead:
        expected = reference_logits(model, inputs, held)
    assert_close(family, out.logits[held], expected[held])
    assert (plain - expected)[held].abs().max() > 1e-2
    # Half of the groups of each picture are gone, and each took its visual token along.
    for plan in plans:
        assert plan.alive.sum(1).tolist() == [math.ceil(plan.alive.shape[1] / 2)] * len(plan.alive)
    totals = visual_mask(inputs).sum(1)
    assert dead[0].sum() == sum(int((~plan.alive).sum()) for plan in plans)
    assert not bool((dead[0] & held).any())
    assert last.candidates == (totals - dead[0].sum(1)).tolist()
    assert [len(one) for one in kept] == [math.floor(total / 4 + 0.5) for total in totals.tolist()]


def test_the_table_of_families_is_that_of_the_library():
    from matrix import FAMILIES

    assert {VARIANTS.get(name, name) for name in FAMILIES if not refused(CHECK, name)} <= set(ROWS)
    assert not {name for name in FAMILIES if refused(CHECK, name)} & set(ROWS)


@pytest.mark.usefixtures("no_grad")
@every_family(fast=("llava_next", "qwen2_vl"), without=[])
def test_a_ratio_of_one_changes_no_bit_and_generate_drops_what_a_call_drops(family):
    if refused(CHECK, family):
        return  # refused above
    model, inputs = build_deep(family), make_inputs(family, PROMPTS["one row"])
    plain = model(**inputs).logits
    apply_grip(model, keep_ratio=1.0, tower_keep_ratio=1.0, tower_selector=by_content, selector=select_by_content)
    assert torch.equal(plain, model(**inputs).logits)
    with model.grip.budget(keep_ratio=0.25, tower_keep_ratio=0.5):
        out = model(**inputs, use_cache=True)
        written = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
        assert not torch.equal(plain, out.logits)
    assert torch.equal(model.grip.kept_tokens(out)[0], model.grip.kept_tokens(written)[0])
    assert int(written.sequences[0, -2]) == int(out.logits[0, -1].argmax())
    with model.grip.disabled():
        assert torch.equal(plain, model(**inputs).logits)


@pytest.mark.parametrize("order", ["video first", "picture first"])
@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("family", ["qwen2_vl", pytest.param("qwen3_vl", marks=pytest.mark.slow)])
def test_a_picture_and_a_video_in_one_call(family, order):
    """Each frame drops half of its rows, and tokens without rows are told apart whichever comes first."""
    model, picture = build_deep(family), make_inputs(family, [[IMAGE]])
    frame = [92, *[VIDEO_ID] * 4, 93]
    video = [*frame, 20, *frame] if family == "qwen3_vl" else [92, *[VIDEO_ID] * 8, 93]
    parts = [picture["input_ids"][0].tolist(), video]
    ids = [
        5,
        *(parts[::-1] if order == "video first" else parts)[0],
        6,
        *(parts[::-1] if order == "video first" else parts)[1],
        7,
    ]
    ids = torch.tensor([ids])
    inputs = {
        **picture,
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE_ID).int() + 2 * (ids == VIDEO_ID).int(),
        "pixel_values_videos": torch.randn(32, 96, generator=torch.Generator().manual_seed(0)),
        "video_grid_thw": torch.tensor([(2, 4, 4)]),
    }
    apply_grip(model, keep_ratio=0.3, selector=select_by_content, **TOWER)
    with watched() as plans:
        out = model(**inputs, use_cache=True)
    kept = model.grip.kept_tokens(out)[0]
    remove_grip(model)
    assert [len(plan.alive) for plan in plans] == [1, 2]
    visual = (ids == IMAGE_ID) | (ids == VIDEO_ID)
    held = ~visual
    held[0, visual[0].nonzero().flatten()[kept]] = True
    positions = model.model.get_rope_index(
        ids, inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"],
        video_grid_thw=inputs["video_grid_thw"], attention_mask=inputs["attention_mask"],
    )[0]  # fmt: skip
    with masked_tower(model, plans) as dead:
        expected = reference_logits(model, inputs, held, positions)
    assert dead[0].sum() == 3 + 4 and not bool((dead[0] & held).any())
    assert_close(family, out.logits[held], expected[held])


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("family", ["llava_onevision", pytest.param("llava_next_video", marks=pytest.mark.slow)])
def test_videos_that_are_pooled_pass_whole(family):
    model = build(family)
    ids = torch.tensor([[5, *[VIDEO_ID] * (9 if family == "llava_onevision" else 8), 7]])
    pixels = torch.randn(1, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": pixels}
    apply_grip(model, keep_ratio=0.5, selector=select_by_content)
    alone = model(**inputs).logits
    apply_grip(model, keep_ratio=0.5, selector=select_by_content, tower_keep_ratio=0.5)
    assert torch.equal(alone, model(**inputs).logits)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padded_pictures_of_different_sizes(attention):
    """SigLIP2: one picture is padded to the length of the other; both lose half of their groups."""
    model = build_deep("lfm2_vl", attention=attention)
    shapes = torch.tensor([(4, 6), (2, 4)])
    mask = torch.arange(24) < shapes.prod(1)[:, None]
    pixels = torch.randn(2, 24, 48, generator=torch.Generator().manual_seed(0)) * mask[..., None]
    ids = torch.tensor([[5, 92, *[IMAGE_ID] * 6, 93, 6, 92, *[IMAGE_ID] * 2, 93, 7]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
        "spatial_shapes": shapes,
        "pixel_attention_mask": mask.long(),
    }
    apply_grip(model, num_tokens=2, scope="image", selector=select_by_content, **TOWER)
    with watched() as plans:
        out = model(**inputs, use_cache=True)
    kept, tokens = model.grip.kept_tokens(out), model.grip.last.candidates
    remove_grip(model)
    # The second picture keeps both of its groups, since the budget may ask for two of each, and one of padding.
    assert tokens == [3 + 2] and plans[0].index.shape == (2, 12)
    held = held_positions(inputs, kept)
    with masked_tower(model, plans) as dead:
        expected = reference_logits(model, inputs, held, original_positions(model, inputs))
    assert dead[0].sum() == 3
    assert_close("lfm2_vl", out.logits[held], expected[held])
