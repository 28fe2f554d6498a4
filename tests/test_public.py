"""The public face: how `apply_grip` may be called, who chooses when nothing is said, and what importing does."""

import logging
import subprocess
import sys
import typing
import warnings

import pytest
import torch
from asking import RAGGED
from tiny import HIDDEN, build, make_inputs
from transformers import AutoConfig, AutoModel

import grip_hf
import grip_hf.training
from grip_hf import GripConfig, GripScorer, apply_grip, remove_grip
from grip_hf.errors import ConfigError, ScorerError
from grip_hf.scorer.model import GripScorerConfig

pytestmark = pytest.mark.usefixtures("no_grad")
OLD = "this spelling of apply_grip is deprecated"


@pytest.fixture
def model():
    return build("llava")


@pytest.fixture
def scorer():
    torch.manual_seed(0)
    return GripScorer(GripScorerConfig(hidden_size=HIDDEN, width=16, attention_width=8, num_heads=2)).eval()


# Who chooses


def test_without_a_scorer_a_method_that_needs_no_training_chooses_and_is_named(model, caplog):
    """It is the one that the docstring names, and it keeps what it keeps when it is asked for."""
    with caplog.at_level(logging.WARNING, logger="grip_hf"):
        apply_grip(model, GripConfig(keep_ratio=0.25))
    inputs = make_inputs("llava", RAGGED)
    logits = model(**inputs).logits
    assert model.grip.config == GripConfig(keep_ratio=0.25, selector="cdpruner") and model.grip.scorer is None
    assert "`cdpruner`, which is logged" in apply_grip.__doc__
    [record] = caplog.records
    assert record.name.startswith("grip_hf.") and "'cdpruner'" in record.message and record.message in repr(model.grip)
    caplog.clear()
    apply_grip(model, keep_ratio=0.25, selector="cdpruner")
    assert not caplog.records and "no scorer" not in repr(model.grip)
    assert torch.equal(model(**inputs).logits, logits)


def test_a_scorer_that_was_asked_for_is_never_replaced(model, scorer, tmp_path, caplog):
    for asked in (
        {"selector": "grip"},
        {"scorer": tmp_path / "nowhere"},
        {"config": GripConfig(0.25, selector="grip")},
    ):
        with pytest.raises(ScorerError):
            apply_grip(model, **{"keep_ratio": 0.25, **asked})
    assert not hasattr(model, "grip")
    apply_grip(model, GripConfig(keep_ratio=0.25), scorer=scorer)
    assert model.grip.config.selector == "grip" and model.grip.scorer is scorer and not caplog.records


def test_settings_given_go_before_those_saved_with_the_scorer(model, scorer, tmp_path):
    apply_grip(model, scorer=scorer, num_tokens=3).grip.save_pretrained(tmp_path)
    apply_grip(model, GripConfig(keep_ratio=0.5, scope="image"), scorer=tmp_path)
    assert model.grip.config == GripConfig(keep_ratio=0.5, scope="image", selector="grip")
    apply_grip(model, scorer=tmp_path, keep_ratio=0.75)
    assert model.grip.config == GripConfig(keep_ratio=0.75, selector="grip")


def test_settings_alone_can_be_saved_without_saying_who_chooses(model, tmp_path):
    GripConfig(num_tokens=5).save_pretrained(tmp_path / "settings")
    apply_grip(model, GripConfig.from_pretrained(tmp_path / "settings"))
    assert model.grip.config == GripConfig(num_tokens=5, selector="cdpruner")
    assert apply_grip(model, scorer=tmp_path / "settings").grip.config.selector == "cdpruner"


@pytest.mark.parametrize("selector", ["grid", lambda batch: batch.positions[..., 0]])
def test_a_scorer_and_another_selector_exclude_each_other(model, scorer, selector):
    with pytest.raises(ConfigError, match="give a scorer or a selector"):
        apply_grip(model, scorer=scorer, keep_ratio=0.5, selector=selector)
    assert not hasattr(model, "grip")


# Spellings


def test_the_second_argument_of_0_1_still_works_and_warns(model, scorer, tmp_path):
    apply_grip(model, scorer=scorer, num_tokens=3).grip.save_pretrained(tmp_path)
    for old in (scorer, tmp_path, str(tmp_path)):
        remove_grip(model)
        with pytest.warns(DeprecationWarning, match=OLD) as caught:
            apply_grip(model, old, num_tokens=4)
        assert caught[0].filename == __file__
        assert model.grip.config == GripConfig(num_tokens=4, selector="grip") and model.grip.scorer is not None
    with pytest.warns(DeprecationWarning, match=OLD):
        apply_grip(model, {"keep_ratio": 0.5, "selector": "grid"})
    assert model.grip.config == GripConfig(keep_ratio=0.5, selector="grid")
    with pytest.warns(DeprecationWarning, match=OLD):
        apply_grip(model, config_or_scorer_or_repo=scorer, num_tokens=2)
    assert model.grip.scorer is scorer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_grip(model, GripConfig(num_tokens=2), scorer=scorer)


@pytest.mark.parametrize("call", [{"config": "similarity"}, {"scorer": "fastv"}, {"scorer": "grip"}])
def test_the_name_of_a_selector_is_no_repository(model, call):
    [name] = call.values()
    with pytest.raises(ConfigError, match=rf"'{name}' is the name of a selector.*selector='{name}'"):
        apply_grip(model, keep_ratio=0.5, **call)
    assert not hasattr(model, "grip")


def test_a_folder_may_have_the_name_of_a_selector(model, scorer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scorer.save_pretrained("similarity")
    assert apply_grip(model, scorer="similarity", keep_ratio=0.5).grip.scorer is not None


@pytest.mark.parametrize("call", [{"config": 3}, {"config": GripConfig}, {"scorer": 3}, {"scorer": {"keep_ratio": 1}}])
def test_other_things_are_refused(model, call):
    with pytest.raises(ConfigError, match=r"expected a GripConfig|scorer must be a GripScorer"):
        apply_grip(model, keep_ratio=0.5, **call)


def test_the_model_keeps_its_type_for_editors():
    import grip_hf.patch as patch

    names = {**vars(patch), "GripScorer": GripScorer}
    for function in (apply_grip, remove_grip):
        hints = typing.get_type_hints(function, names)
        assert hints["model"] is hints["return"] and isinstance(hints["return"], typing.TypeVar)


# Importing


def test_the_auto_classes_know_the_scorer(scorer, tmp_path):
    scorer.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is GripScorerConfig
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is GripScorer
    assert all(torch.equal(a, b) for a, b in zip(scorer.parameters(), again.parameters(), strict=True))


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_waits_for_no_library():
    heavy = "[name for name in ('torch', 'transformers', 'huggingface_hub', 'numpy', 'PIL') if name in sys.modules]"
    assert run(f"import sys, grip_hf; print(*{heavy}, grip_hf.__version__)") == [grip_hf.__version__]
    assert run(f"import sys; from grip_hf import GripConfig, errors; print(*{heavy})") == []
    assert "torch" in run(f"import sys; from grip_hf import apply_grip; print(*{heavy})")


@pytest.mark.parametrize("module", [grip_hf, grip_hf.training], ids=lambda module: module.__name__)
def test_every_public_name_is_there_and_no_other(module):
    for name in module.__all__:
        assert getattr(module, name) is not None and name in dir(module)
    assert set(module._HOMES) | {"errors", "__version__"} == set(module.__all__) | {"errors", "__version__"}
    with pytest.raises(AttributeError, match="no attribute 'apply_grap'"):
        module.apply_grap  # noqa: B018


def test_training_brings_trl_with_the_first_name_that_needs_it():
    code = "import sys; from grip_hf.training import {}; print('trl' in sys.modules)"
    assert run(code.format("FrozenVLM, SampleStore, closeness")) == ["False"]
    assert run(code.format("make_grpo_trainer")) == ["True"]


@pytest.mark.parametrize(
    "name", [name for name in grip_hf.__all__ if name not in ("errors", "__version__", "GripConfig")]
)
def test_any_name_that_needs_transformers_registers_the_scorer(name):
    code = f"from grip_hf import {name}\nfrom transformers import AutoConfig\n"
    code += "print(type(AutoConfig.for_model('grip_scorer')).__name__)"
    assert run(code) == ["GripScorerConfig"]
