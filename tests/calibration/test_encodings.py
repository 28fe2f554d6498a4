"""What is observed of a model whose vision tower is pruned too: answers, and what looks in a row share."""

import itertools
import types

import pytest
import torch
from first_testbed import OnePerScene, load_pocket_llava
from versions import TRAINING

from grip_hf import apply_grip, remove_grip
from grip_hf.calibration.chooser import Chooser
from grip_hf.calibration.observe import Observed, observe
from grip_hf.errors import ConfigError
from grip_hf.evaluation import stopwatch
from grip_hf.frozen.vlm import _stacked

HALF = {"tower_keep_ratio": 0.5, "tower_selector": "distance"}

OTHER = {"process_time": "perf_counter", "perf_counter": "process_time"}


@TRAINING
@pytest.mark.usefixtures("no_grad")
def test_looks_are_observed_with_the_tower_that_they_will_have(tmp_path):
    (model, processor), examples, budgets = load_pocket_llava(), OnePerScene(2, 4), (3, 24, 90, 1.0)
    seen = observe(model, processor, examples, Chooser(tower=HALF), budgets[:3], 2, 8, progress=False)
    assert not hasattr(model, "grip") and seen.budgets == budgets
    assert seen.encodings.tolist() == [0, 0, 1, 2]  # 90 of 144 tokens need more than half of the rows
    assert (seen.vision > 0).all() and seen.vision[0] == seen.vision[1] and (seen.seconds > 0).all()
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    for number, budget in enumerate(budgets):
        remove_grip(model) if budget == 1 else apply_grip(model, num_tokens=budget, **HALF)
        for row in range(2):
            inputs = processor.apply_chat_template([examples[row].messages], **options)
            out = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            said = seen.answers[number, row]
            assert said[said >= 0].tolist() == out.tolist()
            assert seen.kept[number, row] == (144 if budget == 1 else len(model.grip.last.kept[0]))
    seen.save(tmp_path / "seen.npz")
    assert Observed.load(tmp_path / "seen.npz").encodings.tolist() == [0, 0, 1, 2]
    with pytest.raises(ConfigError, match="tower_keep_ratio must be a number"):
        observe(model, processor, examples, Chooser(tower={"tower_keep_ratio": 2}), [24], progress=False)


@TRAINING
@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("cpu_time, clock", [(True, "process_time"), (False, "perf_counter")])
def test_looks_are_timed_by_the_clock_that_was_asked_for(monkeypatch, cpu_time, clock):
    """A clock that goes on by a second whenever it is read: one from the begin of a look to its end, of two rows."""
    model, processor = load_pocket_llava()
    monkeypatch.setattr(
        stopwatch, "time", types.SimpleNamespace(**{clock: itertools.count().__next__, OTHER[clock]: 0})
    )
    seen = observe(model, processor, OnePerScene(2, 4), Chooser(), [5], 2, 8, progress=False, cpu_time=cpu_time)
    assert seen.seconds.tolist() == [0.5, 0.5]


def test_there_is_no_cpu_time_of_a_gpu():
    with pytest.raises(ConfigError, match=r"cpu_time=True counts nothing of what runs on 'cuda'"):
        stopwatch.check_clock(True, torch.device("cuda"))
    stopwatch.check_clock(False, torch.device("cuda"))


def test_pixels_of_unequal_pictures_are_padded():
    one, other = torch.ones(1, 2, 3, 4, 6), torch.ones(2, 1, 3, 5, 6)
    found = _stacked([one, other])
    assert found.shape == (3, 2, 3, 5, 6) and found.sum() == one.sum() + other.sum()
    assert torch.equal(found[:1, :, :, :4], one) and torch.equal(found[1:, :1], other)
