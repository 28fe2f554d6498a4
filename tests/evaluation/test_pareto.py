"""Accuracy against time: joined files, the frontier, and time saved at equal accuracy, recomputed by brute force."""

import json
import random

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from grip_hf.cli.app import app
from grip_hf.errors import ConfigError
from grip_hf.evaluation.pareto import Point, curve, frontier, join, merge, savings, time_at
from grip_hf.evaluation.plot import draw_pareto

RATIOS, TOKENS = (0.5, 0.25, 0.1), 40


def judged(**means):
    """A file of `grip-hf eval`: accuracies per selector, budget by budget."""
    rows = [{"selector": "unpruned", "budget": 1.0, "task": "mean", "accuracy": 0.95}]
    rows += [{"selector": "unpruned", "budget": 1.0, "task": "count", "accuracy": 0.1}]
    for name, accuracies in means.items():
        rows += [
            {"selector": name, "budget": ratio, "task": "mean", "accuracy": accuracy}
            for ratio, accuracy in zip(RATIOS, accuracies, strict=True)
        ]
    return {"meta": {"model": "pocket", "scorers": ["grip", "warmup"]}, "rows": rows}


def timed(unpruned=100.0, model="small", **ratios):
    """A file of `grip-hf bench`: shares of the unpruned time per selector, budget by budget."""
    rows = [
        {"selector": name, "num_tokens": count, "kept": count - (name == "downsampling"), "ttft_ratio": share}
        for name, shares in ratios.items()
        for count, share in zip((20, 10, 4), shares, strict=True)
    ]
    setting = {"model": model, "visual_tokens": TOKENS, "batch": 1, "device": "cpu", "dtype": "f", "attention": "a"}
    return {"setting": setting, "unpruned": {"ttft_ms": unpruned}, "rows": rows}


def test_files_are_joined_budget_by_budget():
    accuracy = judged(grip=(0.9, 0.8, 0.7), warmup=(0.8, 0.7, 0.6), downsampling=(0.5, 0.4, 0.3), oracle=(1, 1, 1))
    times = [timed(grip=(0.5, 0.3, 0.2)), timed(unpruned=300.0, downsampling=(0.4, 0.2, 0.1))]
    points = join(accuracy, times)
    assert points[0] == Point("unpruned", 1.0, TOKENS, 0.95, 100.0) and len(points) == 1 + 4 * 3
    assert points[1] == Point("grip", 0.5, 20, 0.9, 50.0)
    assert points[5] == Point("warmup", 0.25, 10, 0.7, 30.0)  # a scorer takes as long as any other
    assert points[9] == Point("downsampling", 0.1, 3, 0.3, 10.0)  # of this run's unpruned time, not of 300 ms
    assert points[-1] == Point("oracle", 0.1, 4, 1, None)


def test_files_of_the_same_questions_are_merged():
    learned, others = judged(grip=(0.9, 0.8, 0.7)), judged(grid=(0.5, 0.4, 0.3), random=(0.3, 0.2, 0.1))
    others["meta"] = {"model": "pocket", "scorers": []}
    both, wanted = merge([learned, others]), judged(grip=(0.9, 0.8, 0.7), grid=(0.5, 0.4, 0.3), random=(0.3, 0.2, 0.1))
    assert both["rows"] == wanted["rows"] and both["meta"]["scorers"] == ["grip", "warmup"]
    assert merge([wanted])["rows"] == wanted["rows"]
    other_seed = {**others, "meta": {"model": "pocket", "seed": 7}}
    for files, message in (
        ([learned, other_seed], "differ in seed"),
        ([learned, others, learned], "judges grip at the same budget"),
        ([learned, timed()], "expected files of"),
        ([[]], "expected files of"),
    ):
        with pytest.raises(ConfigError, match=message):
            merge(files)


@pytest.mark.parametrize(
    ("drops", "layers", "message"),
    [
        ([4], 12, None),
        ([2], 6, None),
        (None, 12, None),
        ([2], 12, r"drops at layers \[2\] of 6, and .* at \[2\] of 12"),
    ],
)
def test_accuracy_and_time_are_of_the_same_share_of_layers(drops, layers, message):
    accuracy, times = judged(fastv=(0.9, 0.8, 0.7)), timed(fastv=(0.5, 0.3, 0.2))
    for row in accuracy["rows"]:
        if row["selector"] == "fastv":
            row.update(drops=[2], layers=6)
    if drops is not None:
        for row in times["rows"]:
            row.update(drops=drops, layers=layers)
    if message is None:
        assert [point.ms for point in join(accuracy, [times])[1:]] == [50.0, 30.0, 20.0]
        return
    with pytest.raises(ConfigError, match=message + ".*--depth-of 6 --selectors fastv"):
        join(accuracy, [times])


@pytest.mark.parametrize(
    ("accuracy", "times", "message"),
    [
        (judged(grid=(0.9, 0.8, 0.7)), [timed()], "no time of 'grid' at 20 tokens.*--selectors grid --budgets 0.5"),
        (judged(), [timed(), timed(model="tiny")], "differ in model"),
        ({"rows": []}, [timed()], "no row 'unpruned'"),
        (timed(), [judged()], "expected files of"),
        (judged(), [], "expected files of"),
    ],
)
def test_files_that_do_not_fit(accuracy, times, message):
    with pytest.raises(ConfigError, match=message):
        join(accuracy, times)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("axis", ["tokens", "ms"])
def test_the_frontier_is_what_no_other_beats(seed, axis):
    rng = random.Random(seed)
    points = [
        Point("abc"[i % 3], 0.5, rng.randint(1, 9), rng.randint(1, 9) / 10, float(rng.randint(1, 9)))
        for i in range(30)
    ]
    points.append(Point("oracle", 0.5, 0, 2.0, None))

    def beaten(one):
        cost = getattr(one, axis)
        return any(
            getattr(other, axis) <= cost
            and other.accuracy >= one.accuracy
            and (getattr(other, axis), other.accuracy) != (cost, one.accuracy)
            for other in points[:-1]
        )

    expected = {(getattr(one, axis), one.accuracy) for one in points[:-1] if not beaten(one)}
    found = frontier(points, axis)
    assert {(getattr(one, axis), one.accuracy) for one in found} == expected and len(found) == len(expected)


def points_of(**curves):
    points = [Point("unpruned", 1.0, 40, 0.95, 100.0)]
    return points + [Point(name, 0.1, 4, a, ms) for name, pairs in curves.items() for a, ms in pairs]


def test_a_curve_leaves_out_what_is_beaten_and_ends_unpruned():
    points = points_of(a=[(0.8, 10.0), (0.7, 30.0), (0.9, 20.0)], b=[(0.96, 50.0), (0.5, 5.0)])
    assert curve(points, "a") == [(0.8, 10.0), (0.9, 20.0), (0.95, 100.0)]
    assert curve(points, "b") == [(0.5, 5.0), (0.96, 50.0)]
    assert time_at(curve(points, "a"), 0.925) == pytest.approx(60)
    assert time_at(curve(points, "a"), 0.1) == 10 and time_at(curve(points, "a"), 0.951) is None


def test_savings_equal_interpolation_on_a_fine_grid():
    curves = {
        "a": [(0.8, 10.0), (0.9, 20.0)],
        "b": [(0.8, 20.0), (0.9, 40.0)],
        "c": [(0.85, 17.0), (0.93, 55.0)],
        "d": [(0.3, 4.0), (0.9, 60.0)],
    }
    points, found = points_of(**curves), {}
    lines = {name: np.array([*pairs, (0.95, 100.0)]).T for name, pairs in curves.items()}
    for name, (accuracies, times) in lines.items():
        levels = np.linspace(accuracies[0], 0.95, 20_001)
        rivals = [np.interp(levels, *line) for other, line in lines.items() if other != name]
        shares = 1 - np.interp(levels, accuracies, times) / np.min(rivals, 0)
        found[name] = (levels, shares)
    saved = {one.selector: one for one in savings(points, set())}
    assert set(saved) == set(curves)
    for name, (levels, shares) in found.items():
        one = saved[name]
        assert (one.low, one.high) == pytest.approx((levels[0], 0.95))
        assert one.median == pytest.approx(np.median(shares), abs=0.01)
        assert one.largest == pytest.approx(shares.max(), abs=1e-3)
        at = int(np.abs(levels - one.accuracy).argmin())
        assert shares[at] == pytest.approx(one.largest, abs=1e-3)
    # At 0.8 the rivals of a are b with 20 ms, c, whose cheapest budget is better, with 17 ms, and d with 50.7 ms.
    assert found["a"][1][0] == pytest.approx(1 - 10 / 17)


def test_variants_are_no_rivals_and_nothing_is_extrapolated():
    points = points_of(grip=[(0.9, 20.0)], warmup=[(0.9, 10.0)], grid=[(0.5, 10.0)], oracle=[(1.0, None)])
    saved = {one.selector: one for one in savings(points, {"grip", "warmup"})}
    assert saved["grip"].rival == "grid" and saved["grid"].low == 0.5 and "oracle" not in saved
    only = points_of(good=[(0.99, 20.0)], poor=[(0.5, 10.0)])
    assert [one.selector for one in savings(only, set())] == ["poor"]  # nobody else reaches 0.99


def test_the_picture_shows_every_curve_twice():
    accuracy = judged(grip=(0.9, 0.8, 0.7), grid=(0.5, 0.4, 0.3), oracle=(1, 1, 1))
    points = join(accuracy, [timed(grip=(0.5, 0.3, 0.2), grid=(0.4, 0.3, 0.1))])
    left, right = draw_pareto(points, "ms").axes
    lines = [{line.get_label(): line for line in axes.lines} for axes in (left, right)]
    assert {"grip", "grid", "oracle", "frontier", "all tokens"} <= set(lines[0])
    assert lines[0]["grid"].get_xydata().tolist() == pytest.approx(np.array([[4, 30], [10, 40], [20, 50]]))
    assert lines[1]["grip"].get_xydata().tolist() == pytest.approx(np.array([[20, 70], [30, 80], [50, 90]]))
    assert len(lines[1]["oracle"].get_xydata()) == 0
    assert lines[1]["frontier"].get_xydata()[-1].tolist() == pytest.approx([100, 95])


def test_the_command_writes_pictures_and_tables(tmp_path):
    accuracies = judged(grip=(0.9, 0.8, 0.7)), judged(grid=(0.5, 0.4, 0.3))
    files = {
        "a": accuracies[0],
        "a2": accuracies[1],
        "b": timed(grip=(0.5, 0.3, 0.2)),
        "c": timed(grid=(0.4, 0.3, 0.1)),
    }
    for name, data in files.items():
        (tmp_path / name).write_text(json.dumps(data))
    options = [
        "--accuracy",
        tmp_path / "a",
        "--accuracy",
        tmp_path / "a2",
        "--latency",
        tmp_path / "b",
        "--latency",
        tmp_path / "c",
    ]
    options += ["--output", tmp_path / "v1.0", "--json", tmp_path / "d.json"]
    done = CliRunner().invoke(app, ["pareto", *map(str, options)])
    assert done.exit_code == 0, done.output
    assert Image.open(tmp_path / "v1.0.png").size[0] > 1000
    assert "<svg" in (tmp_path / "v1.0.svg").read_text()
    assert "| grip | 50% | 20 | 90.0 | 50.0 | yes |" in (tmp_path / "v1.0.md").read_text()
    data = json.loads((tmp_path / "d.json").read_text())
    assert {one["selector"] for one in data["savings"]} == {"grip", "grid"} and len(data["points"]) == 7
    (tmp_path / "a").write_text("no JSON")
    done = CliRunner().invoke(app, ["pareto", *map(str, options)])
    assert done.exit_code == 2 and "cannot be read" in " ".join(done.output.replace("│", " ").split())
