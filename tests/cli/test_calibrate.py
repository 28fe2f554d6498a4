"""`grip-hf calibrate` on the pocket model: a folder that is used as it is, and errors before any work."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from answered import observed
from classroom import build_vlm, rows
from datasets import Dataset
from first_testbed import FIRST, load_pocket_llava, make_scene
from typer.testing import CliRunner
from versions import TRAINING

from grip_hf import GripConfig, apply_grip
from grip_hf.calibration.calibrate import calibrate
from grip_hf.cli.app import app
from grip_hf.cli.folder import with_default
from grip_hf.errors import ConfigError
from grip_hf.families.table import find_parts
from grip_hf.quality.promise import QUALITY_FILE, Calibration
from grip_hf.tower.facts import find_tower, width_of
from grip_hf.tower.scorer import TowerScorer, TowerScorerConfig

pytestmark = TRAINING
FEW = ["calibrate", "--pocket", *FIRST, "--examples", "72", "--quality", "0.8,0.9"]
FEW += ["--budgets", "5,24", "--batch-size", "36"]


def run(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs") / "scorer"
    done = run(*FEW, "--max-new-tokens", "8", "--cpu-time", "--output", place, "--json", place.parent / "found.json")
    assert done.exit_code == 0, done.output
    assert "80.0%" in done.output and "90.0%" in done.output and "one budget for all" in done.output
    return place


def asked():
    model, processor = load_pocket_llava()
    scene = make_scene(3)
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": scene.image}, {"type": "text", "text": one.text}]}]
        for one in scene.questions[:6]
    ]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return model, processor.apply_chat_template(chats, **options, processor_kwargs={"padding": True})


def test_the_folder_can_be_used_as_it_is(folder):
    model, inputs = asked()
    found = Calibration.load(folder)
    assert json.loads((folder.parent / "found.json").read_text())["made_for"] == found.made_for
    assert found.data["clock"] == "cpu"
    apply_grip(model, scorer=folder, quality=0.9)
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    ladder, looks = model.grip.promise(0.9).ladder, model.grip.last.looks
    kept = [len(one) for one in model.grip.kept_tokens(out)]
    assert kept == [{1.0: 144}.get(ladder[number - 1], ladder[number - 1]) for number in looks]
    with model.grip.disabled():
        full = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert sum(torch.equal(*pair) for pair in zip(out.sequences[:, -4:], full[:, -4:], strict=True)) >= 4
    apply_grip(model, scorer=folder)  # the default budget is the curve's
    config = model.grip.config
    assert (config.num_tokens or config.keep_ratio) == found.default_budget


def test_the_card_tells_the_promise_and_a_copy_of_the_folder_carries_it(folder, tmp_path):
    card = (folder / "README.md").read_text()
    assert "| 90.0% | answer |" in card and "pocket scenes, 72 questions" in card and "transformers" in card
    model, _ = asked()
    apply_grip(model, scorer=folder, quality=0.8)
    model.grip.save_pretrained(tmp_path / "copy")
    assert Calibration.load(tmp_path / "copy") == Calibration.load(folder)
    again = apply_grip(load_pocket_llava()[0], scorer=tmp_path / "copy").grip
    assert again.config.quality == 0.8


def test_another_selector_or_a_damaged_file_is_refused(folder, tmp_path):
    model, _ = asked()
    with pytest.raises(ConfigError, match=r"made for something else.*'similarity'"):
        apply_grip(model, quality=0.9, selector="similarity", calibration=folder)
    apply_grip(model, scorer=folder)
    model.grip.save_pretrained(tmp_path)
    (tmp_path / QUALITY_FILE).write_text("{}")
    with pytest.raises(ConfigError, match="is no calibration"):
        apply_grip(model, scorer=tmp_path, quality=0.9)
    with pytest.warns(UserWarning, match="is no calibration"):
        apply_grip(model, scorer=tmp_path, keep_ratio=0.5)


@pytest.mark.parametrize(
    "change, said",
    [
        (["--examples", "20"], "at least 43 are needed"),
        (["--quality", "1.5"], "quality must be a number in (0, 1)"),
        (["--quality", "much"], "expected shares such as 0.99"),
        (["--confidence", "1"], "confidence must be a number in (0, 1)"),
        (["--unit", "word"], "unit must be one of"),
        (["--rule", "last"], "rules of"),
        (["--budgets", "1.0"], "keep ratios below 1"),
        (["--selector", "fastv"], "drops tokens between layers"),
        (["--output", "/proc/no"], "cannot be"),
        (["--tower-keep-ratio", "0.5,0.25"], "must be one share"),
        (["--tower-keep-ratio", "1.5"], "tower_keep_ratio must be a number in (0, 1]"),
        (["--tower-keep-ratio", "auto", "--tower-depth", "9"], "tower_depth"),
        (["--tower-depth", "2"], "go with --tower-keep-ratio"),
    ],
)
def test_errors_come_before_any_work(tmp_path, monkeypatch, change, said):
    def no_work(*args, **kwargs):
        raise AssertionError("an example was answered")

    monkeypatch.setattr("grip_hf.calibration.observe.FrozenVLM.prepare", no_work)
    done = run(*FEW, "--output", tmp_path / "out", *change)
    assert done.exit_code != 0 and said in " ".join(done.output.replace("│", " ").split()), done.output
    assert not (tmp_path / "out").exists()


def test_it_must_be_said_where_to_write():
    done = run(*FEW)
    assert done.exit_code != 0 and "give --output FOLDER" in " ".join(done.output.replace("│", " ").split())


@pytest.mark.slow
def test_the_vision_tower_pruned_too(folder, tmp_path):
    """The settings of a scorer's folder prune the tower from then on, by the tower scorer that came to lie in it."""
    model, inputs = asked()
    apply_grip(model, scorer=folder, num_tokens=5)
    model.grip.save_pretrained(tmp_path / "scorer")
    tower = find_tower(find_parts(model), None)
    TowerScorer(
        TowerScorerConfig(
            hidden_size=width_of(tower), text_size=model.config.get_text_config().hidden_size, depth=tower.first
        )
    ).save_pretrained(tmp_path / "tower")
    done = run(
        *FEW, "--max-new-tokens", "8", "--scorer", tmp_path / "scorer", "--tower-keep-ratio", "0.6",
        "--tower-selector", tmp_path / "tower",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "is pruned (tower_keep_ratio=0.6, by 'grip'" in (tmp_path / "scorer/README.md").read_text()
    apply_grip(model, scorer=tmp_path / "scorer", quality=0.9)
    assert model.grip.config.tower_keep_ratio == 0.6 and model.grip.tower.scorer is not None
    model.generate(**inputs, max_new_tokens=8, do_sample=False)
    seen = zip(model.grip.last.candidates, model.grip.last.kept, strict=True)
    assert {candidates for candidates, kept in seen if len(kept) < 144} <= {87}
    with pytest.raises(ConfigError, match=r"tower is whole .*, not pruned"):
        apply_grip(model, scorer=tmp_path / "scorer", quality=0.9, tower_keep_ratio=None)
    with pytest.raises(ConfigError, match=r"tower is pruned .*, not whole"):
        apply_grip(model, scorer=folder, quality=0.9, tower_keep_ratio=0.6)


def test_a_default_budget_beyond_the_rows_of_the_tower_becomes_a_promise():
    seen = observed(300)
    found = calibrate(seen, {}, [0.9])
    few = dataclasses.replace(found, curve=[{"budget": 0.7, "tokens": 100.0, "agreement": 0.95}])
    for ratio, budget in ((0.5, (None, 0.9)), (0.8, (0.7, None)), ("auto", (0.7, None)), (None, (0.7, None))):
        config = with_default(GripConfig(num_tokens=1, tower_keep_ratio=ratio), few)
        assert (config.keep_ratio, config.quality) == budget and config.tower_keep_ratio == ratio


@pytest.mark.slow
@pytest.mark.parametrize("tower", [(), ("--tower-keep-ratio", "0.5")], ids=["whole", "half"])
def test_the_curve(tmp_path, tower):
    pytest.importorskip("matplotlib")
    picture, file = tmp_path / "curve.png", tmp_path / "curve.json"
    done = run(
        "curve", "--pocket", *FIRST, "--examples", "60", "--quality", "0.8", "--budgets", "0.05,0.25", "--rounds", "2",
        "--output", picture, "--json", file, "--max-new-tokens", "8", "--cpu-time", *tower,
    )  # fmt: skip
    assert done.exit_code == 0 and "smallest budget within 1 points" in done.output, done.output
    found = json.loads(file.read_text())
    assert [row["name"] for row in found["rows"]] == ["5%", "25%", "100%", "80.0% promised", "80.0% promised"]
    assert all(row["ttft_ms"] > 0 and 0 <= row["agreement"] <= 1 for row in found["rows"])
    assert found["meta"]["timing"]["clock"] == found["meta"]["clock"] == "cpu"
    assert found["rows"][2]["accuracy"] > 0.9 and picture.stat().st_size > 10_000


@pytest.mark.slow
def test_a_model_and_data_of_ones_own_by_one_process_and_by_two(tmp_path):
    """One question a picture is asked, shared out among processes or not; answers are not needed."""
    for part in build_vlm():
        part.save_pretrained(tmp_path / "vlm")
    data = [{"image": row["image"], "prompt": row["prompt"]} for row in rows(90)]  # every two share a picture
    Dataset.from_list(data).save_to_disk(tmp_path / "data")
    script = tmp_path / "run.py"
    script.write_text("from grip_hf.cli.app import app\napp()\n")
    asked = ["calibrate", "--model", tmp_path / "vlm", "--dataset", tmp_path / "data", "--selector", "similarity"]
    asked += ["--quality", "0.7", "--budgets", "0.2,0.5", "--max-new-tokens", "3", "--batch-size", "7"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    found = []
    for launch, name in (([], "one"), (["-m", "torch.distributed.run", "--nproc_per_node", "2"], "two")):
        command = [sys.executable, *launch, script, *asked, "--output", tmp_path / name]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("one question about each of 45 pictures is asked, of 90") >= 1
        found.append(Calibration.load(tmp_path / name))
    one, two = found
    assert one.made_for == two.made_for and one.made_for["selector"] == "similarity" and one.data == two.data
    assert one.data["rows"] == 45 and one.data["dataset"] == "data"
    kept = [[{**row, "ms": 0} for row in each.curve] for each in found]
    assert kept[0] == kept[1] and len({row["agreement"] for row in kept[0]}) > 1
    model, _ = build_vlm()
    apply_grip(model, scorer=tmp_path / "two", quality=0.7)
    assert model.grip.config.selector == "similarity" and model.grip.promise(0.7).quality == 0.7
    with pytest.raises(ConfigError, match="made for something else"):
        apply_grip(build_vlm(seed=1)[0], scorer=tmp_path / "two", quality=0.7)
