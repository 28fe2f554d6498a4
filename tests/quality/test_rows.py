"""A quality where rows leave the vision tower too, but for the look at all tokens; whose calibration it needs."""

import dataclasses

import pytest
import torch
from asking import generate
from matrix import every_family, refused
from promised import ALWAYS, NEVER, calibration, promise
from tiny import HIDDEN, IMAGE, build, make_inputs, select_by_content
from tower_reference import build_deep, by_content

from grip_hf import GripConfig, apply_grip, remove_grip
from grip_hf.errors import ConfigError, UnsupportedModelError
from grip_hf.families.table import find_parts
from grip_hf.tower.facts import find_tower, width_of
from grip_hf.tower.scorer import TowerGripSelector, TowerScorer, TowerScorerConfig

pytestmark = pytest.mark.usefixtures("no_grad")
PROMPTS = [[3, IMAGE, 4], [2, IMAGE, 2, IMAGE, 3], [5], [2, IMAGE, 6], [4, IMAGE, 1]]
GRID = {"tower_keep_ratio": 0.5, "tower_selector": "grid"}
CHECK = "drops in the tower"


def fixed(model, inputs, ratio, **tower):
    """What a fixed budget gives, with as many rows of the tower; all of them is the model without a patch."""
    if ratio == 1:
        return generate(remove_grip(model), inputs), None
    apply_grip(model, keep_ratio=ratio, selector=select_by_content, **tower)
    return generate(model, inputs), model.grip.last


@every_family(fast=("llava", "qwen2_vl", "llava_next"))
def test_looks_give_what_their_budgets_give_and_the_last_one_the_whole_model(family):
    if refused(CHECK, family) or family == "janus":
        return  # refused whatever the budget
    tower = {"tower_keep_ratio": 0.5, "tower_selector": by_content}
    model, inputs, encoded = build_deep(family), make_inputs(family, PROMPTS), []
    alone = [fixed(model, inputs, ratio, **tower) for ratio in (0.25, 0.5, 1)]
    find_tower(find_parts(model), None).module.register_forward_hook(lambda *_: encoded.append(1))

    def ask(*thresholds):
        known = calibration(model, promise((0.25, 0.5, 1.0), thresholds), tower=tower)
        apply_grip(model, quality=0.9, selector=select_by_content, calibration=known, **tower)
        encoded.clear()
        return generate(model, inputs), model.grip.last, len(encoded)

    _, _, once = ask(NEVER, NEVER)
    for thresholds, end, times in (((NEVER, NEVER), 0, 1), ((ALWAYS, NEVER), 1, 1), ((ALWAYS, ALWAYS), 2, 2)):
        found, last, calls = ask(*thresholds)
        (expected, kept), seen = alone[end], [total > 0 for total in last.total]
        assert torch.equal(found.sequences, expected.sequences)
        assert last.looks == [end + 1 if one else 1 for one in seen] and calls == times * once
        assert last.candidates == (last.total if kept is None else kept.candidates)
    confidence = sorted(one for one, is_seen in zip(ask(NEVER, NEVER)[1].confidence, seen, strict=True) if is_seen)
    mixed, last, calls = ask((confidence[1] + confidence[2]) / 2, ALWAYS)
    assert set(last.looks) == {1, 3} and calls == 2 * once
    for row, number in enumerate(last.looks):
        assert torch.equal(mixed.sequences[row], alone[number - 1][0].sequences[row])
        for step, logits in enumerate(mixed.logits):
            torch.testing.assert_close(logits[row], alone[number - 1][0].logits[step][row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])  # pictures in a batch, and packed patches
def test_only_rows_in_doubt_are_encoded_again(family):
    model, inputs = build_deep(family), make_inputs(family, [PROMPTS[0], PROMPTS[3], PROMPTS[4]])
    known = calibration(model, promise((0.25, 0.5), (NEVER,)), tower={**GRID, "tower_keep_ratio": "auto"})
    ask = {"selector": select_by_content, "quality": 0.9, **GRID, "tower_keep_ratio": "auto"}
    apply_grip(model, calibration=known, **ask)
    generate(model, inputs)
    middle = sum(sorted(model.grip.last.confidence)[:2]) / 2
    sizes = []
    find_tower(find_parts(model), None).module.register_forward_hook(lambda _, args, out: sizes.append(len(out[0])))
    # Three quarters of the rows stay at a quarter of the tokens; at a half all do, as at all tokens.
    ladder = promise((0.25, 0.5, 1.0), (middle, ALWAYS))
    apply_grip(model, calibration=dataclasses.replace(known, promises=(ladder,)), **ask)
    generate(model, inputs)
    assert sorted(model.grip.last.looks) == [1, 1, 3] and len(sizes) == 2 and sizes[0] > 2 * sizes[1]


def test_numbers_of_tokens_encode_anew_where_they_need_more_rows():
    model, inputs = build_deep("llava"), make_inputs("llava", PROMPTS[:1])
    sizes = []
    find_tower(find_parts(model), None).layers[-1].register_forward_hook(lambda _, a, out: sizes.append(out.shape[1]))
    known = calibration(model, promise((2, 6, 12, 1.0), (ALWAYS,) * 3), tower=GRID)
    apply_grip(model, quality=0.9, selector=select_by_content, calibration=known, **GRID)
    generate(model, inputs)
    assert model.grip.last.looks == [4] and model.grip.last.total == [16] and len(sizes) == 3


def tower_scorer(model, seed=0):
    torch.manual_seed(seed)
    tower = find_tower(find_parts(model), None)
    sizes = {"hidden_size": width_of(tower), "text_size": HIDDEN, "width": 8, "depth": tower.first}
    return TowerScorer(TowerScorerConfig(**sizes)).eval()


def test_a_calibration_of_another_tower_is_refused_and_both_are_told():
    model = build_deep("llava")
    learned = [{**GRID, "tower_selector": TowerGripSelector(tower_scorer(model, seed))} for seed in (0, 1)]
    whole, half = calibration(model), calibration(model, tower=GRID)
    others = [
        (
            whole,
            GRID,
            r"tower is pruned \(tower_keep_ratio=0.5, by 'grid' after 1 .*not whole \(tower",
        ),
        (half, {}, r"tower is whole \(tower_keep_ratio=None\), not pruned \(tower_keep_ratio=0.5, by 'grid' after 1"),
        (half, {**GRID, "tower_keep_ratio": 1.0}, "tower is whole"),
        (half, {**GRID, "tower_keep_ratio": 0.6}, r"tower_keep_ratio=0\.6.*not.*tower_keep_ratio=0\.5"),
        (half, {**GRID, "tower_keep_ratio": "auto"}, r"tower_keep_ratio='auto'.*not.*tower_keep_ratio=0\.5"),
        (half, {**GRID, "tower_selector": "random"}, "by 'random' .*not.* by 'grid'"),
        (half, {**GRID, "tower_depth": 2}, "after 2 layers.*not.*after 1 layers"),
        (calibration(model, tower=learned[0]), learned[1], r"by 'grip' \w{16} after .* by 'grip' \w{16} after"),
    ]
    for known, tower, said in others:
        before = apply_grip(model, keep_ratio=0.5, selector=select_by_content).grip
        with pytest.raises(ConfigError, match=f"made for something else.*{said}"):
            apply_grip(model, quality=0.9, selector=select_by_content, calibration=known, **tower)
        assert model.grip is before
    for known, tower in (
        (half, {**GRID, "tower_depth": 1}),  # what is taken where nothing is said
        (whole, {"tower_keep_ratio": 1.0}),
        (calibration(model, tower=learned[0]), learned[0]),
    ):
        apply_grip(model, quality=0.9, selector=select_by_content, calibration=known, **tower)
    old = {name: fact for name, fact in whole.made_for.items() if name != "tower"}
    old = dataclasses.replace(whole, made_for=old)  # as written before towers could be pruned
    apply_grip(model, quality=0.9, selector=select_by_content, calibration=old)
    with pytest.raises(ConfigError, match=r"tower is pruned.*not whole"):
        apply_grip(model, quality=0.9, selector=select_by_content, calibration=old, **GRID)


def test_a_tower_of_one_call():
    model, inputs = build_deep("llava"), make_inputs("llava", PROMPTS)
    expected, last = fixed(model, inputs, 0.25, **GRID)
    half = calibration(model, promise((0.25, 1.0), (NEVER,)), tower=GRID)
    whole = dataclasses.replace(half, made_for={**half.made_for, "tower": None})
    apply_grip(model, quality=0.9, selector=select_by_content, calibration=whole, tower_selector="grid")
    for ask in ({"tower_keep_ratio": 0.5}, {"quality": 0.9, "tower_keep_ratio": 0.5}):
        with pytest.raises(ConfigError, match=r"tower is pruned.*not whole"), model.grip.budget(**ask):
            raise AssertionError("it was not refused")
    assert model.grip._boundary.tower is None
    apply_grip(model, keep_ratio=0.25, selector=select_by_content, calibration=half, tower_selector="grid")
    with pytest.raises(ConfigError, match=r"tower is whole.*not pruned"):
        model.grip.budget(quality=0.9)
    with model.grip.budget(quality=0.9, tower_keep_ratio=0.5):
        found = generate(model, inputs)
    assert torch.equal(found.sequences, expected.sequences) and model.grip.last.candidates == last.candidates


def test_what_no_tower_can_be_pruned_with_is_refused_as_ever():
    model = build("llava")
    known = calibration(model)
    with pytest.raises(ConfigError, match="tower_keep_ratio drops some"):
        apply_grip(model, quality=0.9, selector="cls_attention", calibration=known, tower_keep_ratio=0.5)
    with pytest.raises(ConfigError, match="tower_keep_ratio must be"):
        GripConfig(quality=0.9, tower_keep_ratio=1.5)
    model = build("aria")
    known = calibration(model)
    with pytest.raises(UnsupportedModelError, match="tower_keep_ratio needs a vision tower"):
        apply_grip(model, quality=0.9, selector=select_by_content, calibration=known, **GRID)
    assert not hasattr(model, "grip") or model.grip.config.quality is None
