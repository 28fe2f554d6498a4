"""Tables of budgets and promises, and the script that draws scenes again and again, on rows that are made up."""

import json

import numpy as np
import pytest
from answered import TOKENS, observed
from typer.testing import CliRunner

from grip_hf.calibration import draws
from grip_hf.calibration.draws import app, joined, times_of
from grip_hf.calibration.observe import Observed
from grip_hf.calibration.overview import draw, overview, smallest
from grip_hf.calibration.timing import Times, first_token

TIMES = Times([10.0, 20.0, 40.0, 130.0], [5.0] * 4, [1.0, 1.0, 2.0, 4.0])


def test_time_to_the_first_token_that_stands():
    assert first_token(TIMES, [2], [1.0], 3.0, "answer") == 40
    # picture once; a glance; for a tenth of the rows the rest of that answer and a look at all tokens
    assert first_token(TIMES, [0, 3], [1.0, 0.1], 3.0, "answer") == pytest.approx(5 + 5 + 0.1 * (2 * 1 + 125))
    assert first_token(TIMES, [0, 3], [1.0, 0.1], 3.0, "first") == pytest.approx(5 + 5 + 0.1 * 125)
    # the picture at half of its rows for the first two budgets, and whole for the last
    half = Times([10.0, 20.0, 40.0, 130.0], [3.0, 3.0, 4.0, 6.0], [1.0] * 4, [0, 0, 1, 2])
    assert first_token(half, [0, 1], [1.0, 0.5], 3.0, "first") == pytest.approx(10 + 0.5 * (20 - 3))
    assert first_token(half, [0, 2, 3], [1.0, 0.5, 0.1], 3.0, "first") == pytest.approx(10 + 0.5 * 40 + 0.1 * 130)


def test_an_overview_has_every_budget_and_every_promise_that_can_be_made():
    seen = observed(900)
    rows = overview(seen, TIMES, [0.999, 0.95, 0.9], seed=1)
    assert [row["budget"] for row in rows if row["kind"] == "fixed"] == [4, 12, 36, 1.0]
    assert [row["ttft_ms"] for row in rows[:4]] == TIMES.ttft
    promised = [(row["quality"], row["rule"]) for row in rows if row["kind"] == "promise"]
    assert promised == [(0.9, "answer"), (0.95, "answer"), (0.9, "first"), (0.95, "first")]  # 0.999 needs more rows
    assert all(row["agreement"] >= row["quality"] and row["ttft_ms"] < 130 for row in rows[4:])
    best, name = smallest(rows, 5)
    assert name == "agreement" and best["agreement"] >= 0.95
    assert all(row["agreement"] < 0.95 for row in rows[:4] if row["tokens"] < best["tokens"])
    pytest.importorskip("matplotlib")
    left, right = draw(rows, "rows").axes
    assert list(left.lines[0].get_xdata()) == list(TOKENS) and list(right.lines[0].get_xdata()) == TIMES.ttft


def test_accuracy_counts_where_it_is_known():
    seen = observed(300)
    seen.scores[:] = 1.0
    seen.scores[0, :30] = 0.0
    rows = overview(seen, TIMES, [0.9])
    assert smallest(rows, 1)[0]["budget"] == 12 and smallest(rows, 10)[0]["budget"] == 4
    assert smallest(rows, 1)[1] == "accuracy"


def test_draws(tmp_path):
    for seed in (1, 2):
        observed(900, seed).save(tmp_path / f"{seed}.npz")
    bench = {
        "setting": {"visual_tokens": 576},
        "unpruned": {"ttft_ms": 100.0, "vision_ms": 10.0, "decode_ms": 5.0},
        "rows": [
            {"num_tokens": count, "ttft_ms": 9.0, "ttft_ratio": share, "decode_ms": 2.0}
            for count, share in ((4, 0.2), (12, 0.25), (36, 0.4))
        ],
    }
    (tmp_path / "small.json").write_text(json.dumps(bench))
    assert times_of(bench, (4, 12, 36, 1.0)) == Times([20.0, 25.0, 40.0, 100.0], [10.0] * 4, [2.0, 2.0, 2.0, 5.0])
    options = ["--rows", "300", "--fresh", "200", "--draws", "3", "--qualities", "0.9,0.95"]
    files = [str(tmp_path / f"{seed}.npz") for seed in (1, 2)]
    more = ["--latency", str(tmp_path / "small.json"), "--json", str(tmp_path / "out.json")]
    done = CliRunner().invoke(app, ["table", *files, *options, *more], catch_exceptions=False)
    assert done.exit_code == 0 and "no scene in two draws" in done.output
    found = json.loads((tmp_path / "out.json").read_text())
    assert [line["below"] for line in found["summary"]] == [
        f"{sum(row['agreement'] < row['quality'] for row in found['draws'] if row['quality'] == q)} of 3"
        for q in (0.9, 0.95)
    ]
    assert all(0 < row["ttft"] <= 100 and row["fixed_ttft"] <= 100 for row in found["summary"])
    done = CliRunner().invoke(app, ["table", *files, *options, "--rows", "600"], catch_exceptions=False)
    assert "drawn anew each time from 1800 scenes" in done.output
    assert len(joined([Observed.load(file) for file in files])) == 1800


def test_more_scenes_than_were_answered_are_refused(tmp_path):
    observed(90, 1).save(tmp_path / "seen.npz")
    for rows, fresh in ((90, 0), (60, 31)):
        done = CliRunner().invoke(app, ["table", f"{tmp_path}/seen.npz", "--rows", f"{rows}", "--fresh", f"{fresh}"])
        assert done.exit_code == 2 and f"--rows {rows} and --fresh {fresh} are more than the 90" in done.output


@pytest.mark.parametrize(("rows", "fresh", "looked", "how"), [
    (300, 200, 200, "no scene in two draws"),
    (600, 0, 1200, "no scene in two calibrations"),
    (700, 0, 1100, "drawn anew each time from 1800 scenes"),
])  # fmt: skip
def test_which_scenes_are_drawn(tmp_path, monkeypatch, rows, fresh, looked, how):
    """Fresh ones are none that the draw calibrated on; where there are enough, no two calibrations share one."""
    observed(1800, 1).save(tmp_path / "seen.npz")
    orders, own = [], draws.one_draw
    monkeypatch.setattr(
        draws, "one_draw", lambda seen, order, *rest: (orders.append(order), own(seen, order, *rest))[1]
    )
    options = ["--rows", rows, "--fresh", fresh, "--draws", "3", "--qualities", "0.9"]
    done = CliRunner().invoke(app, ["table", str(tmp_path / "seen.npz"), *map(str, options)], catch_exceptions=False)
    assert f"calibrate on and {looked} fresh ones, {how}" in done.output
    assert [(len(order), len(set(order))) for order in orders] == [(rows + looked, rows + looked)] * 3
    known = [set(order[:rows]) for order in orders]
    assert (len(set.union(*known)) == 3 * rows) == (rows < 700)


def test_scenes_of_another_kind(tmp_path):
    observed(900, 1).save(tmp_path / "known.npz")
    harder = observed(1200, 2)
    wrong = np.random.default_rng(0).random(1200) < 0.2  # and the model does not know it
    harder.answers[:-1, wrong, 1] = 9
    harder.save(tmp_path / "other.npz")
    arguments = ["elsewhere", "--known", tmp_path / "known.npz", "--other", tmp_path / "other.npz", "--rows", "300"]
    more = ["--draws", "12", "--qualities", "0.9,0.995"]
    done = CliRunner().invoke(app, [*map(str, arguments), *more], catch_exceptions=False)
    first, last = (line.split(" | ") for line in done.output.splitlines()[-2:])
    assert first[3] == "100%" and float(first[6].split("%")[0]) < 20  # of 12 draws, at most two
    assert float(first[1][:-1]) < 90 < float(first[4][:-1])
    assert last[4] == "100.00%"  # 300 rows cannot tell so much: all tokens
