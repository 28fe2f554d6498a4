"""Ladders with the selectors of the library: those that read the tower, the question, or a scorer; images; the Hub."""

import pytest
import torch
from asking import generate
from loopback_hub import Repo
from promised import promise
from tiny import HIDDEN, IMAGE, build, make_inputs

from grip_hf import GripScorer, apply_grip
from grip_hf.engine.generation import writing
from grip_hf.errors import ConfigError
from grip_hf.quality.identity import fingerprint
from grip_hf.quality.promise import Calibration
from grip_hf.scorer.model import GripScorerConfig

pytestmark = pytest.mark.usefixtures("no_grad")
PROMPTS = [[3, IMAGE, 4], [2, IMAGE, 2, IMAGE, 3], [5], [2, IMAGE, 6]]


def calibrated(model, *promises, **settings):
    """A calibration of a model as it is patched with these settings."""
    handle = apply_grip(model, keep_ratio=0.5, **settings).grip
    facts = {**handle.identity(), "writing": writing(model, {})}
    return Calibration(facts, "answer", 6, 6, True, {}, promises or (promise((0.25, 1.0)),), (), {})


def tiny_scorer(seed=1):
    torch.manual_seed(seed)
    return GripScorer(GripScorerConfig(hidden_size=HIDDEN, width=16, attention_width=8, num_heads=2)).eval()


@pytest.mark.parametrize(
    "settings",
    [
        {"selector": "cls_attention"},  # taps of the tower, which must come along with encoded pictures
        {"selector": "visionzip"},
        {"selector": "cdpruner"},
        {"selector": "random", "seed": 3},
        {"selector": "grid", "scope": "image"},
        {"selector": "similarity", "position_ids": "compact"},
        {"scorer": tiny_scorer()},
    ],
    ids=lambda settings: settings.get("selector", "grip"),
)
def test_every_way_to_choose_keeps_at_each_rung_what_it_keeps_alone(settings):
    model, inputs = build("llava", "eager"), make_inputs("llava", PROMPTS)
    found = calibrated(model, promise((0.25, 1.0), (0.0,)), **settings)
    apply_grip(model, quality=0.9, calibration=found, **settings)
    first = generate(model, inputs)
    sure = sorted(one for one, total in zip(model.grip.last.confidence, model.grip.last.total, strict=True) if total)
    middle = calibrated(model, promise((0.25, 0.5), ((sure[0] + sure[1]) / 2,)), **settings)
    apply_grip(model, quality=0.9, calibration=middle, **settings)
    out = generate(model, inputs)
    looks, kept = model.grip.last.looks, model.grip.kept_tokens(out)
    assert sorted(looks) == [1, 1, 1, 2]
    with model.grip.budget(keep_ratio=0.5):
        second = generate(model, inputs)
    for row, number in enumerate(looks):
        alone = (first, second)[number - 1]
        assert torch.equal(out.sequences[row], alone.sequences[row])
        assert torch.equal(kept[row], model.grip.kept_tokens(alone)[row])


def test_another_scorer_or_setting_is_another_subject():
    model = build("llava")
    found = calibrated(model, scorer=tiny_scorer())
    apply_grip(model, quality=0.9, scorer=tiny_scorer(), calibration=found)
    assert fingerprint(tiny_scorer()) == fingerprint(tiny_scorer().to(torch.bfloat16)) != fingerprint(tiny_scorer(2))
    for settings in ({"scorer": tiny_scorer(2)}, {"scorer": tiny_scorer(), "scope": "image"}, {"selector": "grid"}):
        with pytest.raises(ConfigError, match="made for something else"):
            apply_grip(model, quality=0.9, calibration=found, **settings)
    other = Calibration(**{**vars(found), "made_for": {**found.made_for, "hidden_size": 999}})
    with pytest.raises(ConfigError, match=f"hidden_size is {HIDDEN}, not 999"):
        apply_grip(model, quality=0.9, scorer=tiny_scorer(), calibration=other)


def test_a_model_that_was_tuned_further_is_another_subject():
    model = build("llava")
    found = calibrated(model, scorer=tiny_scorer())
    apply_grip(model.to(torch.bfloat16), quality=0.9, scorer=tiny_scorer(), calibration=found)
    apply_grip(build("llava"), quality=0.9, scorer=tiny_scorer(), calibration=found)
    tuned = build("llava")
    tuned.model.language_model.layers[1].mlp.up_proj.weight.data.mul_(1.1)
    with pytest.raises(ConfigError, match="weights is"):
        apply_grip(tuned, quality=0.9, scorer=tiny_scorer(), calibration=found)
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(build("llava"), peft.LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(ConfigError, match="weights is"):
        apply_grip(adapted, quality=0.9, scorer=tiny_scorer(), calibration=found)
    with torch.device("meta"):
        away = build("llava")
    apply_grip(away, quality=0.9, scorer=tiny_scorer(), calibration=found)  # nothing can be said of its weights


def test_a_promise_travels_over_the_hub_and_inside_a_checkpoint(hub, tmp_path):
    model = build("llava")
    found = calibrated(model, scorer=tiny_scorer())
    apply_grip(model, quality=0.9, scorer=tiny_scorer(), calibration=found)
    hub.repos["user/promised"] = Repo()
    model.grip.push_to_hub("user/promised")
    assert "quality.json" in hub.repos["user/promised"].files()
    other = apply_grip(build("llava"), scorer="user/promised")
    assert other.grip.config.quality == 0.9 and other.grip.calibration == found
    model.save_pretrained(tmp_path / "whole")
    again = apply_grip(type(model).from_pretrained(tmp_path / "whole"))
    assert again.grip.config.quality == 0.9 and again.grip.promise(0.9).ladder == (0.25, 1.0)
    apply_grip(model, keep_ratio=0.5, scorer=tiny_scorer())
    model.grip.push_to_hub("user/promised")
    assert "quality.json" not in hub.repos["user/promised"].files()  # nothing is promised of these settings
