"""A quality where rows leave the vision tower too: each look keeps as many of them as its own budget says."""

import pytest
from asking import generate
from promised import ALWAYS, NEVER, calibration, promise
from tiny import IMAGE, make_inputs, select_by_content
from tower_reference import build_deep

from grip_hf import apply_grip
from grip_hf.errors import ConfigError

pytestmark = pytest.mark.usefixtures("no_grad")
PROMPTS = [[3, IMAGE, 4], [2, IMAGE, 6, 7]]
ROWS = {"tower_keep_ratio": 0.5, "tower_selector": "grid"}
MADE_FOR = {"tower": [0.5, None, "grid"]}


@pytest.mark.parametrize(("threshold", "looks", "budget"), [(NEVER, 1, 0.25), (ALWAYS, 2, 1.0)])
def test_each_look_is_what_its_budget_gives(threshold, looks, budget):
    model, inputs = build_deep("llava"), make_inputs("llava", PROMPTS)
    known = calibration(model, promise((0.25, 1.0), (threshold,)), made_for=MADE_FOR)
    apply_grip(model, keep_ratio=budget, selector=select_by_content, **(ROWS if budget < 1 else {}))
    alone = generate(model, inputs)
    rows = model.grip.last.candidates
    apply_grip(model, quality=0.9, selector=select_by_content, calibration=known, **ROWS)
    found = generate(model, inputs)
    assert found.sequences.tolist() == alone.sequences.tolist()
    assert model.grip.last.looks == [looks] * len(PROMPTS) and model.grip.last.candidates == rows
    assert (rows < model.grip.last.total) == (budget < 1)


def test_a_calibration_with_all_rows_promises_nothing_of_fewer():
    model, inputs = build_deep("llava"), make_inputs("llava", PROMPTS)
    known = calibration(model, promise((0.25, 1.0), (NEVER,)))
    with pytest.raises(ConfigError, match="tower is"):
        apply_grip(model, quality=0.9, selector=select_by_content, calibration=known, **ROWS)
    apply_grip(model, quality=0.9, selector=select_by_content, calibration=known)
    with model.grip.budget(tower_keep_ratio=0.5), pytest.raises(ConfigError, match=r"tower_keep_ratio=0\.5 is not"):
        generate(model, inputs)
