"""The learnt sense of doubt learns where there is something to learn; the script compares it with the plain one."""

import dataclasses
import json

import numpy as np
import pytest
import typer
from answered import observed
from typer.testing import CliRunner

from grip_hf.calibration.features import NAMES, Features
from grip_hf.calibration.head import auroc, main, train


def with_features(n, seed):
    """Rows whose wrong answers a feature tells, which the probability does not."""
    seen = observed(n, seed, tells=False)
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(4, n, len(NAMES))).astype(np.float32)
    wrong = seen.answers[..., 1] == 7
    features[..., NAMES.index("entropy of the first token")] += 3 * wrong
    return dataclasses.replace(seen, features=Features(features, rng.normal(size=(n, 6)).astype(np.float16)))


def test_auroc_counts_pairs():
    sure, losses = np.array([0.9, 0.5, 0.7, 0.5]), np.array([0.0, 1.0, 1.0, 0.0])
    pairs = [(a > b) + (a == b) / 2 for a in sure[losses == 0] for b in sure[losses == 1]]
    assert auroc(sure, losses) == pytest.approx(np.mean(pairs))
    assert np.isnan(auroc(sure, np.zeros(4)))


@pytest.mark.parametrize("rule", ["answer", "first"])
def test_a_head_learns_what_the_probability_does_not_tell(rule):
    seen = with_features(2000, 0)
    doubt = train(seen, np.arange(1000), rule, seed=0, steps=200)
    rest = np.arange(1000, 2000)
    found, wrong = doubt(rest), (seen.answers[..., 1] == 7).astype(float)[:, rest]
    assert found.shape == (4, 1000) and (found[-1] == 1).all()
    assert auroc(found[0], wrong[0]) > 0.9 > 0.6 > auroc(seen.confidences[0][rest], wrong[0])


def test_the_script(tmp_path):
    file = tmp_path / "seen.npz"
    with_features(1600, 1).save(file)
    app = typer.Typer()
    app.command()(main)
    options = ["--draws", "3", "--rows", "300", "--qualities", "0.9"]
    done = CliRunner().invoke(app, [str(file), *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    line = done.output.strip().splitlines()[-1].split(" | ")
    assert float(line[3]) < float(line[1])  # fewer tokens by the head
    bench = {"setting": {"visual_tokens": 576}, "unpruned": {"ttft_ms": 90.0, "vision_ms": 9.0, "decode_ms": 5.0}}
    bench["rows"] = [{"num_tokens": n, "ttft_ratio": n / 50, "decode_ms": 2.0} for n in (4, 12, 36)]
    (tmp_path / "small.json").write_text(json.dumps(bench))
    more = [*options, "--latency", str(tmp_path / "small.json")]
    assert CliRunner().invoke(app, [str(file), *more], catch_exceptions=False).exit_code == 0
    observed(300).save(file)
    assert "--features" in CliRunner().invoke(app, [str(file), *options]).output
