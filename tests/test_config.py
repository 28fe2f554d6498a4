"""GripConfig validates itself and survives a round trip through JSON."""

import dataclasses
import json
import math

import numpy as np
import pytest
from loopback_hub import Repo

import grip_hf
from grip_hf.config import CONFIG_FILE, CONFIG_VERSION, LIBRARY, GripConfig
from grip_hf.errors import ConfigError, HubError


@pytest.mark.parametrize("ratio", [0, 0.0, -0.1, 1.01, math.nan, math.inf, True, "0.5", [0.5]])
def test_bad_ratio(ratio):
    with pytest.raises(ConfigError, match=r"keep_ratio must be a number in \(0, 1\]"):
        GripConfig(keep_ratio=ratio)


@pytest.mark.parametrize("count", [0, -3, 1.5, True, "64", math.nan])
def test_bad_count(count):
    with pytest.raises(ConfigError, match="num_tokens must be an integer >= 1"):
        GripConfig(num_tokens=count)


def test_exactly_one_budget():
    for budgets in ({}, {"keep_ratio": 0.5, "num_tokens": 3}):
        with pytest.raises(ConfigError, match="exactly one of keep_ratio and num_tokens"):
            GripConfig(**budgets)


@pytest.mark.parametrize(
    "setting, value",
    [
        ("scope", "batch"),
        ("position_ids", "new"),
        ("selector", ""),
        ("selector", 3),
        ("selector_kwargs", [1]),
        ("selector_kwargs", {1: 2}),
        ("seed", -1),
        ("seed", 1.5),
        ("seed", True),
        ("version", 1),
    ],
)
def test_bad_settings_name_themselves(setting, value):
    with pytest.raises(ConfigError, match=setting):
        GripConfig(keep_ratio=0.5, **{setting: value})


def test_num_kept():
    ratio = GripConfig(keep_ratio=0.25)
    assert [ratio.num_kept(n) for n in (0, 1, 2, 6, 10, 576)] == [0, 1, 1, 2, 3, 144]  # halves round up
    assert GripConfig(keep_ratio=1.0).num_kept(7) == 7
    count = GripConfig(num_tokens=64)
    assert [count.num_kept(n) for n in (0, 10, 64, 576)] == [0, 10, 64, 64]


def test_numpy_numbers_become_plain_ones():
    assert json.loads(GripConfig(num_tokens=np.int64(5)).to_json())["num_tokens"] == 5
    assert json.loads(GripConfig(keep_ratio=np.float32(0.5)).to_json())["keep_ratio"] == 0.5


def test_json_round_trip(tmp_path):
    config = GripConfig(num_tokens=64, scope="image", selector="random", selector_kwargs={"a": [1, 2]}, seed=3)
    assert GripConfig.from_json(config.to_json()) == config
    config.to_json(tmp_path / "grip.json")
    assert GripConfig.from_json(tmp_path / "grip.json") == config
    assert config.to_dict()["version"] == CONFIG_VERSION and config.to_dict()[LIBRARY] == grip_hf.__version__
    with pytest.raises(ConfigError, match="not a JSON document"):
        GripConfig.from_json("{oops")


def test_newer_settings_warn_and_are_left_out():
    with pytest.warns(UserWarning, match=r"\['depth'\].*'9.0'"):
        config = GripConfig.from_dict({"keep_ratio": 0.5, "depth": 3, "version": "9.0"})
    assert config.keep_ratio == 0.5
    with pytest.raises(ConfigError, match="must be a dict"):
        GripConfig.from_dict([1])


def test_replace_swaps_the_budget_and_keeps_the_rest():
    config = GripConfig(keep_ratio=0.5, seed=7)
    assert config.replace(num_tokens=3) == GripConfig(num_tokens=3, seed=7)
    assert config.replace(num_tokens=3).replace(keep_ratio=0.5) == config
    with pytest.raises(ConfigError, match="exactly one"):
        config.replace(keep_ratio=0.5, num_tokens=3)
    with pytest.raises(ConfigError, match=r"unknown settings \['ratio'\]"):
        config.replace(ratio=0.5)


def test_config_is_frozen_and_owns_its_dicts():
    kwargs = {"a": 1}
    config = GripConfig(keep_ratio=0.5, selector_kwargs=kwargs)
    kwargs["a"] = 2
    assert config.selector_kwargs == {"a": 1}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


def test_equal_configs_have_equal_hashes():
    one = GripConfig(keep_ratio=0.5, selector="fastv", selector_kwargs={"a": [1], "b": 2})
    same = GripConfig(keep_ratio=0.5, selector="fastv", selector_kwargs={"b": 2.0, "a": [1]})
    other = one.replace(selector_kwargs={"a": [2], "b": 2})
    assert one == same and hash(one) == hash(same) and len({one, same, other, one.replace(num_tokens=3)}) == 3
    assert hash(GripConfig(num_tokens=np.int64(3))) == hash(GripConfig(num_tokens=3))


def test_save_and_load_a_folder(tmp_path):
    config = GripConfig(num_tokens=64, scope="image", selector="fastv", selector_kwargs={"layers": 2})
    config.save_pretrained(tmp_path / "run" / "grip")
    assert [path.name for path in (tmp_path / "run" / "grip").iterdir()] == [CONFIG_FILE]
    assert GripConfig.from_pretrained(tmp_path / "run" / "grip") == config
    assert GripConfig.from_pretrained(str(tmp_path / "run"), subfolder="grip") == config
    with pytest.raises(ConfigError, match=CONFIG_FILE):
        GripConfig.from_pretrained(tmp_path / "run")


def test_load_from_the_hub(hub):
    hub.repos["user/settings"] = Repo()
    text = GripConfig(keep_ratio=0.25, seed=3).to_json()
    hub.repos["user/settings"].put({CONFIG_FILE: text.encode()})
    assert GripConfig.from_pretrained("user/settings") == GripConfig(keep_ratio=0.25, seed=3)
    for name in ("user/nothing", "no/such/folder"):
        with pytest.raises(HubError, match=name):
            GripConfig.from_pretrained(name)


def test_a_config_of_a_newer_release_warns(recwarn):
    data = GripConfig(keep_ratio=0.5).to_dict()
    for wrote in (None, "0.0.1", grip_hf.__version__):
        assert GripConfig.from_dict({**data, LIBRARY: wrote}) == GripConfig(keep_ratio=0.5)
    old = {key: value for key, value in data.items() if key != LIBRARY}
    assert GripConfig.from_dict(old) == GripConfig(keep_ratio=0.5) and not recwarn.list
    with pytest.warns(UserWarning, match=r"written by grip-hf 999\.0, and this is"):
        assert GripConfig.from_dict({**data, LIBRARY: "999.0"}) == GripConfig(keep_ratio=0.5)
    with pytest.warns(UserWarning, match="'newest' is no version"):
        GripConfig.from_dict({**data, LIBRARY: "newest"})


def test_who_chooses_may_be_left_open_and_old_files_say_it():
    assert GripConfig(keep_ratio=0.5).selector is None
    assert GripConfig.from_json(GripConfig(keep_ratio=0.5).to_json()).selector is None
    assert GripConfig.from_dict({"keep_ratio": 0.5, "selector": "grip", "version": "1.0"}).selector == "grip"
