"""The vision tower in eval, bench and pareto: with it and without it, side by side."""

import json

import pytest
import torch
from classroom import build_vlm, make_scorer, rows
from typer.testing import CliRunner
from versions import TRAINING

from grip_hf import apply_grip, remove_grip
from grip_hf.cli.app import app
from grip_hf.errors import ConfigError
from grip_hf.evaluation.latency import run_bench
from grip_hf.evaluation.methods import Pruned
from grip_hf.evaluation.pareto import Point, join
from grip_hf.evaluation.runner import evaluate
from grip_hf.evaluation.towers import TowerChoice, tower_label, with_towers
from grip_hf.frozen.data import DatasetExamples
from grip_hf.selectors import get_selector


def test_bench_shows_tower_scorer_and_prefill_apart():
    found = run_bench(
        "tiny", ("grip", "cls_attention"), [4], rounds=1, decode_tokens=1, tower=TowerChoice((0.5, 0.25), depth=1)
    )
    assert [row["selector"] for row in found["rows"]] == [
        "grip",
        "grip + tower 0.5",
        "grip + tower 0.25",
        "cls_attention",
    ]
    assert [row["tower_keep_ratio"] for row in found["rows"]] == [None, 0.5, 0.25, None]
    for row in [found["unpruned"], *found["rows"]]:
        assert 0 < row["tower_ms"] < row["vision_ms"]
        assert (row["tower_selector_ms"] > 0) == ("+ tower" in row.get("selector", ""))
    assert {row["kept"] for row in found["rows"]} == {4}


def test_the_command_takes_a_tower_and_names_what_is_wrong(tmp_path):
    words = [
        "bench",
        "--model",
        "tiny",
        "--selectors",
        "grid",
        "--budgets",
        "4",
        "--rounds",
        "1",
        "--decode-tokens",
        "1",
    ]
    words += ["--device", "cpu", "--json", str(tmp_path / "bench.json")]
    tower = ["--tower-keep-ratio", "0.5", "--tower-selector", "distance", "--tower-depth", "0.5"]
    result = CliRunner().invoke(app, [*words, *tower])
    assert result.exit_code == 0, result.output
    assert "tower scorer ms" in " ".join(result.output.split()) or "tower" in result.output
    assert [row["selector"] for row in json.loads((tmp_path / "bench.json").read_text())["rows"]] == [
        "grid", "grid + tower 0.5"
    ]  # fmt: skip
    for wrong, said in (
        (["--tower-depth", "1"], "go with --tower-keep-ratio"),
        (["--tower-keep-ratio", "0"], "tower_keep_ratio must be a number in (0, 1]"),
        (["--tower-keep-ratio", "0.5", "--tower-depth", "7"], "must leave at least one"),
        (["--tower-keep-ratio", "0.5", "--tower-selector", "nope"], "unknown tower_selector 'nope'"),
    ):
        result = CliRunner().invoke(app, [*words, *wrong])
        assert result.exit_code != 0 and said in " ".join(result.output.replace("│", " ").split())


@TRAINING
def test_answers_are_those_of_a_patched_model():
    model, processor = build_vlm()
    data, scorer = rows(6), get_selector("grip", scorer=make_scorer())
    settings = {"tower_keep_ratio": 0.5, "tower_depth": 1, "tower_selector": "distance"}
    found = evaluate(
        model,
        processor,
        DatasetExamples(data),
        {"grip": Pruned(scorer, **settings)},
        [4],
        batch_size=4,
        progress=False,
    )
    said = [one.said for one in found.marks if one.selector == "grip"]
    assert not hasattr(model, "grip")
    apply_grip(model, num_tokens=4, selector=scorer, **settings)
    for row, text in zip(data, said, strict=True):
        inputs = processor(images=row["image"], text="<image>" + row["prompt"], return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        with torch.no_grad():
            out = model.generate(
                **inputs, max_new_tokens=4, do_sample=False, suppress_tokens=[model.config.image_token_id]
            )[0, length:]
        assert processor.decode(out, skip_special_tokens=True).strip().startswith(text)
        assert model.grip.last.candidates == [8]
    remove_grip(model)


def test_those_that_can_come_with_a_tower():
    model, _ = build_vlm()
    several = [get_selector("grip", scorer=make_scorer(seed)) for seed in (0, 1)]
    chosen = {"grip": several, "cls_attention": get_selector("cls_attention"), "grid": get_selector("grid")}
    found = with_towers(chosen, TowerChoice((0.5,), "distance", 1), model, 0)
    assert list(found) == ["grip", "grip + tower 0.5", "cls_attention", "grid", "grid + tower 0.5"]
    assert [one.selector for one in found["grip + tower 0.5"]] == several
    with pytest.raises(ConfigError, match=r"tower_keep_ratio must be a number in \(0, 1\], got 2"):
        TowerChoice((2,))


def test_times_and_accuracies_of_a_tower_are_joined():
    name = tower_label("warmup", 0.5)
    judged = {
        "meta": {"scorers": ["warmup"]},
        "rows": [
            {"selector": "unpruned", "budget": 1.0, "task": "mean", "accuracy": 0.9},
            {"selector": name, "budget": 0.5, "task": "mean", "accuracy": 0.8},
        ],
    }
    setting = {"model": "m", "visual_tokens": 40, "batch": 1, "device": "cpu", "dtype": "f", "attention": "a"}
    row = {"selector": "grip + tower 0.5", "num_tokens": 20, "ttft_ratio": 0.25}
    times = [{"setting": setting, "unpruned": {"ttft_ms": 100.0}, "rows": [row]}]
    assert join(judged, times)[1] == Point(name, 0.5, 20, 0.8, 25.0)
    times[0]["rows"] = []
    with pytest.raises(ConfigError, match=r"--selectors grip --budgets 0.5 --tower-keep-ratio 0.5 --json FILE"):
        join(judged, times)
