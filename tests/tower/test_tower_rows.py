"""Pure functions of the tower, its settings, and what is refused."""

import copy
import threading

import pytest
import torch
from tiny import IMAGE, TINY, build, make_inputs, select_by_content
from tower_reference import build_deep, by_content, watched
from transformers import CLIPVisionConfig

from grip_hf import GripConfig, apply_grip, remove_grip
from grip_hf.engine.budget import Budget
from grip_hf.engine.context import Hook
from grip_hf.engine.keepsets import VisualBatch
from grip_hf.errors import ConfigError, GripError, UnsupportedModelError
from grip_hf.tower.drop import cut_argument
from grip_hf.tower.facts import find_tower, first_without
from grip_hf.tower.places import choose, cut_lengths, packed_places, shaped_places, square_places
from grip_hf.tower.rows import drops_rows, rows_of
from grip_hf.tower.selectors import TOWER_SELECTORS, equal_neighbours, get_tower_selector

CPU = torch.device("cpu")
INPUTS = [[3, IMAGE, 4]]


def test_groups_of_a_square_are_its_squares():
    places = square_places(2, 17, 1, 2, None, CPU)
    assert places.rows[0].tolist() == [[1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]]
    assert places.rows[1, 0].tolist() == [18, 19, 22, 23]
    assert places.positions[0].tolist() == [[0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]]


@pytest.mark.parametrize(("length", "merge"), [(13, 1), (16, 3)])
def test_what_makes_no_square_raises(length, merge):
    with pytest.raises(GripError, match="make no square"):
        square_places(1, length, 0, merge, None, CPU)


def test_a_padded_picture_has_groups_of_padding():
    places = shaped_places(torch.tensor([(2, 4), (2, 2)]), 8, 2, CPU)
    assert places.rows.tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7]], [[8, 9, 10, 11], [12, 13, 14, 15]]]
    assert places.mask.tolist() == [[True, True], [True, False]]
    with pytest.raises(GripError, match="do not divide it"):
        shaped_places(torch.tensor([(3, 2)]), 8, 2, CPU)


def test_packed_pictures_are_told_by_their_grid():
    places = packed_places(torch.tensor([(2, 2, 4), (1, 2, 2)]), 2, 0, CPU)
    assert places.mask.tolist() == [[True, True], [True, True], [True, False]]
    assert places.rows[:, 0].tolist() == [[0, 1, 2, 3], [8, 9, 10, 11], [16, 17, 18, 19]]


def test_windows_have_the_pixels_and_centres_of_their_order():
    """4 x 3 groups in windows of 2 x 2; the right-hand ones are cut."""
    places = packed_places(torch.tensor([(1, 8, 6)]), 2, 2, CPU)
    order = [0, 1, 3, 4, 2, 5, 6, 7, 9, 10, 8, 11]
    assert places.rows[0].flatten().tolist() == list(range(48))
    assert places.pixels[0].tolist() == [[4 * group + within for within in range(4)] for group in order]
    centres = [[(group // 3 + 0.5) / 4, (group % 3 + 0.5) / 3] for group in order]
    torch.testing.assert_close(places.positions[0], torch.tensor(centres))


def test_the_best_groups_stay_and_the_prefix():
    places = square_places(2, 5, 1, 1, None, CPU)
    plan = choose(torch.tensor([[0.0, 3, 1, 2], [4.0, 1, 2, 3]]), places, torch.tensor([2, 2]), 5, packed=False)
    assert plan.index.tolist() == [[0, 2, 4], [0, 1, 4]]
    hidden = torch.arange(20.0).view(2, 5, 2)
    assert torch.equal(plan.put_back(plan.take(hidden) + 100, hidden)[0, :, 0], torch.tensor([100.0, 2, 104, 6, 108]))


def test_packed_rows_are_cut_with_their_lengths():
    places = packed_places(torch.tensor([(1, 2, 4), (1, 2, 2)]), 2, 0, CPU)
    plan = choose(torch.tensor([[0.0, 1], [5, 9]]), places, torch.tensor([1, 1]), 12, packed=True)
    assert plan.index.tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert cut_lengths(torch.tensor([0, 8, 12], dtype=torch.int32), plan.index, 12).tolist() == [0, 4, 8]
    # Windows of one group each: those that are empty go.
    assert cut_lengths(torch.tensor([0, 4, 8, 12]), plan.index, 12).tolist() == [0, 4, 8]
    assert cut_lengths(torch.tensor([0, 4, 8, 12], dtype=torch.int32), plan.index, 12).dtype == torch.int32


def test_masks_are_cut_in_all_their_forms():
    places = square_places(1, 4, 0, 1, None, CPU)
    plan = choose(torch.tensor([[0.0, 3, 1, 2]]), places, torch.tensor([2]), 4, packed=False)
    square = torch.arange(16).view(1, 1, 4, 4)
    assert cut_argument(plan, "attention_mask", square).tolist() == [[[[5, 7], [13, 15]]]]
    assert cut_argument(plan, "attention_mask", square[:, :, :1]).tolist() == [[[[1, 3]]]]
    assert cut_argument(plan, "attention_mask", square[:, 0, 0]).tolist() == [[1, 3]]
    assert cut_argument(plan, "attention_mask", None) is None
    with pytest.raises(UnsupportedModelError, match="an argument"):
        cut_argument(plan, "strange", torch.zeros(1, 7, 4))


@pytest.mark.parametrize(
    ("budget", "shared", "kept"),
    [
        (Budget(keep_ratio=0.1, tower_keep_ratio=0.5), False, [5, 8]),  # rounded up
        (Budget(keep_ratio=0.75, tower_keep_ratio=0.5), False, [7, 12]),  # as the language model needs
        (Budget(keep_ratio=(0.1, 0.8), tower_keep_ratio=0.5), False, [8, 12]),
        (Budget(num_tokens=7, tower_keep_ratio=0.5), False, [7, 8]),
        (Budget(num_tokens=20, tower_keep_ratio=0.5), True, [8, 13]),  # of one sample with 24 in all
        (Budget(num_tokens=100, tower_keep_ratio=0.5), True, [9, 15]),
        (Budget(keep_ratio=0.1, tower_keep_ratio="auto"), False, [7, 12]),  # three quarters of the rows at least
        (Budget(keep_ratio=0.3, tower_keep_ratio="auto"), False, [9, 14]),  # three times as many as tokens
        (Budget(num_tokens=6, tower_keep_ratio="auto"), True, [7, 12]),  # 6 of 24 tokens: three quarters
        (Budget(keep_ratio=0.1), True, [9, 15]),
        (Budget(keep_ratio=0.1, tower_keep_ratio=0.5, everything=True), True, [9, 15]),
    ],
)
def test_as_many_rows_stay_as_the_budget_may_ask_for(budget, shared, kept):
    assert rows_of(budget, [9, 15], shared) == kept
    assert drops_rows(budget) == (kept != [9, 15] or budget.most == 100)


@pytest.mark.parametrize(
    ("setting", "value", "match"),
    [
        ("tower_keep_ratio", 0, r"tower_keep_ratio must be a number in \(0, 1\], got 0"),
        ("tower_keep_ratio", 0.25, "must not be below keep_ratio"),
        ("tower_depth", 0, "tower_depth must be a number of layers >= 1 or a share"),
        ("tower_depth", 1.5, "tower_depth must be"),
        ("tower_depth", True, "tower_depth must be"),
        ("tower_selector", "", "tower_selector must be the name"),
    ],
)
def test_bad_settings(setting, value, match):
    with pytest.raises(ConfigError, match=match):
        GripConfig(keep_ratio=0.5, **{setting: value})


def test_settings_are_saved(tmp_path):
    config = GripConfig(keep_ratio=0.5, tower_keep_ratio=0.5, tower_depth=0.25, tower_selector="grid")
    config.save_pretrained(tmp_path)
    assert GripConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize("depth", [None, 1, 0.5, 0.99, 5])
def test_depth(depth):
    if depth == 5:
        with pytest.raises(ConfigError, match="must leave at least one of the vision tower's 5 layers before and one"):
            first_without(depth, 5)
        return
    expected = {None: 2, 1: 1, 0.5: 2, 0.99: None}[depth]
    if expected is None:
        with pytest.raises(ConfigError, match="must leave"):
            first_without(depth, 5)
    else:
        assert first_without(depth, 5) == expected


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"tower_depth": 2}, ConfigError, "2 layers before and one after it, got 2"),
        ({"tower_selector": "none such"}, ConfigError, "unknown tower_selector 'none such'; known ones are"),
        ({"selector": "cls_attention"}, ConfigError, "needs vision.salience of all rows"),
        (
            {"selector": "visionzip"},
            ConfigError,
            "needs vision.salience, vision.mean_keys, vision.features of all rows",
        ),
        (
            {"selector": "fastv", "selector_kwargs": {"layers": 1}},
            ConfigError,
            "lets all visual tokens into the language model",
        ),
    ],
)
def test_refused_before_anything_is_changed(settings, error, match):
    model = build("llava")
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with pytest.raises(error, match=match):
        apply_grip(model, keep_ratio=0.25, tower_keep_ratio=0.5, **{"selector": "grid", **settings})
    assert not hasattr(model, "grip")
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert {name: set(one) for name, one in before.items()} == {n: set(m.__dict__) for n, m in model.named_modules()}


def test_a_budget_of_a_call_is_refused_like_a_setting():
    model = apply_grip(build("llava"), keep_ratio=0.25, selector="cls_attention")
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    with pytest.raises(ConfigError, match="of all rows of the vision tower"):
        model.grip.budget(tower_keep_ratio=0.5)
    with pytest.raises(ConfigError, match="must not be below keep_ratio"):
        model.grip.budget(tower_keep_ratio=0.2)
    assert hooks == sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def hooks_of(module):
    """Ours; transformers leaves some too."""
    every = [
        hook for one in module.modules() for hook in [*one._forward_hooks.values(), *one._forward_pre_hooks.values()]
    ]
    return [hook for hook in every if isinstance(hook, Hook)]


@pytest.mark.usefixtures("no_grad")
def test_without_it_a_patched_tower_has_no_hook():
    model = apply_grip(build("llava"), keep_ratio=0.25, selector="grid")
    tower = find_tower(model.grip._parts).module
    assert not hooks_of(tower)
    inputs = make_inputs("llava", INPUTS)
    with watched() as plans:
        plain = model(**inputs).logits
        with model.grip.budget(tower_keep_ratio=0.5):
            model(**inputs)
        assert len(plans) == 1 and torch.equal(plain, model(**inputs).logits) and len(plans) == 1
    remove_grip(model)
    assert not hooks_of(tower)
    assert "pack_image_features" not in vars(model.model) and "get_image_features" not in vars(model.model)


@pytest.mark.usefixtures("no_grad")
def test_a_larger_budget_of_a_call_keeps_more_rows():
    model, inputs = build("llava"), make_inputs("llava", INPUTS)
    apply_grip(model, keep_ratio=0.25, selector=select_by_content, tower_keep_ratio=0.5, tower_selector=by_content)
    with watched() as plans, model.grip.budget(keep_ratio=0.75):
        out = model(**inputs, use_cache=True)
    assert int(plans[0].alive.sum()) == 12 and len(model.grip.kept_tokens(out)[0]) == 12


@pytest.mark.usefixtures("no_grad")
def test_pictures_encoded_ahead_take_along_what_they_lack_and_others_raise():
    model, inputs = build("llava"), make_inputs("llava", INPUTS)
    whole = model.get_image_features(inputs["pixel_values"], return_dict=True)
    call = {name: value for name, value in inputs.items() if name != "pixel_values"}
    apply_grip(model, keep_ratio=0.5, selector=select_by_content, tower_keep_ratio=0.5, tower_selector=by_content)
    direct = model(**inputs).logits
    cut = model.get_image_features(inputs["pixel_values"], return_dict=True)
    if "mm_encoder_outputs" not in model.grip._boundary.base_parameters:
        pytest.skip("this release of transformers takes no encoded pictures")
    assert torch.equal(direct, model(**call, mm_encoder_outputs={"image": cut}).logits)
    with pytest.raises(GripError, match="which of these pictures' were is not known"):
        model(**call, mm_encoder_outputs={"image": whole})
    # They stay no candidates where the budget would keep every token.
    with model.grip.disabled():
        model(**call, mm_encoder_outputs={"image": cut})
    assert len(model.grip.last.kept[0]) == 8


def test_gradient_checkpointing_raises():
    model, inputs = build("llava"), make_inputs("llava", INPUTS)
    apply_grip(model, keep_ratio=0.5, selector="grid", tower_keep_ratio=0.5)
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(GripError, match="gradient checkpointing"):
        model(**inputs, labels=inputs["input_ids"])


def test_gradients_pass_through_the_rows_that_stay():
    model, inputs = build_deep("llava"), make_inputs("llava", INPUTS)
    apply_grip(model, keep_ratio=0.5, selector=select_by_content, tower_keep_ratio=0.5, tower_selector=by_content)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    grads = [p.grad for p in model.model.vision_tower.encoder.layers.parameters()]
    assert all(torch.isfinite(one).all() for one in grads) and all(bool(one.any()) for one in grads if one.ndim == 2)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("family", ["llava", "internvl", "qwen2_5_vl"])
@pytest.mark.parametrize("name", sorted(TOWER_SELECTORS))
def test_every_selector_drops_half_whatever_the_batch(family, name):
    """A picture keeps the same rows alone and in a batch with others."""
    model, inputs = build_deep(family), make_inputs(family, [[3, IMAGE, 4], [2, IMAGE, 2, IMAGE, 3]])
    apply_grip(model, keep_ratio=0.25, selector="grid", tower_keep_ratio=0.5, tower_selector=name)
    with watched() as plans:
        model(**inputs)
        model(**make_inputs(family, INPUTS))
    together, alone = plans[0].alive, plans[1].alive
    assert torch.equal(together[: len(alone)], alone) and int(alone.sum()) == (alone.shape[1] + 1) // 2 * len(alone)


def test_names_of_selectors():
    with pytest.raises(ConfigError, match="unknown tower_selector"):
        get_tower_selector("similarity")
    assert get_tower_selector("random", seed=3).seed == 3


def test_exact_copies_of_a_neighbour_are_found():
    picture = torch.tensor([[1, 1, 2], [3, 1, 2], [3, 3, 3]])
    positions = torch.stack(torch.meshgrid(torch.arange(3.0), torch.arange(3.0), indexing="ij"), -1).view(1, 9, 2)
    copies = equal_neighbours(picture.view(1, 9, 1), positions / 3, torch.ones(1, 9, dtype=torch.bool))
    assert copies.view(3, 3).tolist() == [[False, True, False], [False, True, True], [True, True, True]]
    padded = equal_neighbours(picture.view(1, 9, 1), positions / 3, torch.arange(9)[None] < 6)
    assert padded.view(3, 3)[2].tolist() == [False] * 3


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_pixels_that_are_compared_are_those_of_the_rows(family):
    """A picture of one colour but for one group: that group stays, every other one is a copy."""
    model, inputs = build_deep(family), make_inputs(family, INPUTS)
    pixels = torch.zeros_like(inputs["pixel_values"])
    if family == "llava":
        pixels[0, :, 8:12, 4:8] = 1  # the third row, the second column of 4 x 4
        place = 9
    else:
        pixels[4 * 3 : 4 * 4] = 1  # the fourth of 2 x 3 groups
        place = 3
    apply_grip(model, keep_ratio=1 / 6, selector="grid", tower_keep_ratio=1 / 6, tower_selector="duplicates")
    model(**{**inputs, "pixel_values": pixels})
    groups = {"llava": 16, "qwen2_5_vl": 6}[family]
    copies = model.grip._boundary.tower.selector.duplicates
    # The first group, the odd one and the one behind it (and below it, where there is one) are no copies of both.
    assert int(copies[0]) == groups - 2
    assert place in model.grip.last.kept[0].tolist() or model.grip.last.candidates[0] < groups


def test_copies_and_threads_have_hooks_of_their_own():
    model, inputs = build("llava"), make_inputs("llava", INPUTS)
    apply_grip(model, keep_ratio=0.25, selector=select_by_content, tower_keep_ratio=0.5, tower_selector=by_content)
    with torch.no_grad():
        expected = model(**inputs).logits
        other = copy.deepcopy(model)
        remove_grip(model)
        assert torch.equal(expected, other(**inputs).logits)
        assert not torch.equal(expected, model(**inputs).logits)
        found = []
        threads = [threading.Thread(target=lambda: found.append(run(other, inputs))) for _ in range(4)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        assert len(found) == 4 and all(torch.equal(expected, one) for one in found)


@torch.no_grad()
def run(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def test_an_exception_in_the_tower_leaves_no_call_behind():
    from grip_hf.tower import drop

    def fails(batch: VisualBatch):
        raise RuntimeError("no scores")

    model, inputs = build("llava"), make_inputs("llava", INPUTS)
    apply_grip(model, keep_ratio=0.25, selector="grid", tower_keep_ratio=0.5, tower_selector=fails)
    with pytest.raises(RuntimeError, match="no scores"), torch.no_grad():
        model(**inputs)
    assert not drop._thread.calls


def test_an_unknown_tower_is_refused():
    config = TINY["llava"].config()
    model = build("llava")
    assert isinstance(config.vision_config, CLIPVisionConfig)
    model.config.vision_config.model_type = "strange_tower"
    with pytest.raises(UnsupportedModelError, match="has one of type 'strange_tower'"):
        apply_grip(model, keep_ratio=0.25, selector="grid", tower_keep_ratio=0.5)
