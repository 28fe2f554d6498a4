"""What a server is asked to do is read, checked and kept as plain data, without vLLM."""

import json
from types import SimpleNamespace

import pytest
from first_testbed import WEIGHTS
from loopback_hub import Repo
from vllm_engines import write_scorer

from grip_hf.errors import GripError
from grip_hf.serving.vllm.settings import Settings, asked, settle


def config(**grip):
    text = SimpleNamespace(hidden_size=192, model_type="llama")
    return SimpleNamespace(
        model_type="llava",
        architectures=["LlavaForConditionalGeneration"],
        image_token_id=4,
        get_text_config=lambda: text,
        **grip,
    )


def test_the_part_of_a_checkpoint_is_found_by_itself():
    hf_config = config()
    settings = settle(hf_config, str(WEIGHTS), None)
    assert settings.config.keep_ratio == 0.11 and settings.reads_question and not asked(hf_config)
    json.dumps(hf_config.grip_settings)
    again = Settings.of(hf_config)
    assert again == settings and again.digest == settings.digest
    assert settings.selector(hf_config).scorer.config.hidden_size == 192


@pytest.mark.parametrize("off", [None, False])
def test_it_can_be_switched_off(off):
    hf_config = config(grip=off)
    assert settle(hf_config, str(WEIGHTS), None) is None and Settings.of(hf_config) is None


def test_without_settings_and_part_nothing_is_pruned(tmp_path):
    assert settle(config(), str(tmp_path), None) is None


def test_without_a_scorer_a_budget_is_filled_as_apply_grip_does(tmp_path):
    settings = settle(config(grip={"keep_ratio": 0.5}), str(tmp_path), None)
    assert settings.config.selector == "cdpruner" and settings.reads_question


def published(hub, name, folder):
    """A repository with the pocket's GRIP part in this folder of it."""
    hub.repos[name] = Repo()
    hub.repos[name].put({f"{folder}{path.name}": path.read_bytes() for path in (WEIGHTS / "grip").iterdir()})


def test_a_scorer_comes_from_the_hub_at_a_revision(hub, tmp_path):
    published(hub, "user/scorer", "")
    commit = hub.repos["user/scorer"].branches["main"]
    settings = settle(config(grip={"scorer": "user/scorer", "revision": commit}), str(tmp_path), None)
    assert (settings.scorer, settings.revision, settings.config.keep_ratio) == ("user/scorer", commit, 0.11)
    assert settings.selector(config()).scorer.config.hidden_size == 192
    assert settle(config(grip="user/scorer"), str(tmp_path), None).config.selector == "grip"


def test_a_part_on_the_hub_is_found_at_the_models_revision(hub):
    published(hub, "user/vlm", "grip/")
    commit = hub.repos["user/vlm"].branches["main"]
    settings = settle(config(), "user/vlm", commit)
    assert (settings.scorer, settings.revision) == ("user/vlm", commit)
    hub.repos["user/plain"] = Repo()
    assert settle(config(), "user/plain", None) is None
    with pytest.raises(GripError, match="user/nobody"):
        settle(config(grip={"scorer": "user/nobody", "keep_ratio": 0.5}), "user/plain", None)


def test_settings_win_over_those_of_the_part(tmp_path):
    settings = settle(config(grip={"num_tokens": 5}), str(WEIGHTS), None)
    assert (settings.config.keep_ratio, settings.config.num_tokens) == (None, 5)
    scorer = write_scorer(tmp_path, 192, query_aware=False)
    settings = settle(config(grip={"scorer": scorer, "keep_ratio": 0.5}), str(WEIGHTS), None)
    assert settings.scorer == scorer and not settings.reads_question


@pytest.mark.parametrize("selector", ["grid", "random", "diversity"])
def test_these_selectors_read_no_question(selector, tmp_path):
    settings = settle(config(grip={"selector": selector, "keep_ratio": 0.5}), str(tmp_path), None)
    assert not settings.reads_question and settings.scorer is None


@pytest.mark.parametrize(
    ("grip", "message"),
    [
        ({"keep_ratio": 0}, "keep_ratio must be a number"),
        ({"keep_ratio": 0.5, "selector": "grip"}, "needs a scorer, and .* carries none"),
        ({"selector": "grid"}, "exactly one of keep_ratio and num_tokens"),
        ({"selector": "grid", "quality": 0.9}, "promised of transformers' generate"),
        ({"selector": "grid", "keep_ratio": 0.5, "selector_kwargs": {"x": 1}}, "takes the arguments"),
        ({"selector": "visionzip", "keep_ratio": 0.5}, "not served by vLLM"),
        ({"keep_ratio": 0.5, "colour": 1, "selector": "grid"}, "unknown settings"),
        ({"scorer": "/nowhere"}, "no folder '/nowhere'"),
        (3, "must be an object"),
    ],
)
def test_what_is_not_allowed_is_refused(grip, message, tmp_path):
    with pytest.raises(GripError, match=message):
        settle(config(grip=grip), str(tmp_path), None)


def test_a_request_may_bring_one_budget_and_nothing_else():
    settings = settle(config(), str(WEIGHTS), None)
    assert settings.budget(None) == (0.11, None)
    assert settings.budget({"num_tokens": 7}) == (None, 7)
    for wrong in ({}, {"scope": "image"}, 0.5, {"keep_ratio": 0.5, "num_tokens": 3}, {"keep_ratio": "x"}):
        with pytest.raises(GripError):
            settings.budget(wrong)
