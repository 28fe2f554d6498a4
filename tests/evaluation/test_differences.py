"""Paired differences against scipy's paired t interval."""

import json

import pytest
import torch
from scipy.stats import ttest_rel
from typer.testing import CliRunner

from grip_hf.cli.app import app
from grip_hf.errors import ConfigError
from grip_hf.evaluation.differences import differences


def test_they_are_those_of_a_paired_t_test():
    generator = torch.Generator().manual_seed(0)
    scores = {
        name: torch.randint(0, 2, (50,), generator=generator).double().tolist() for name in ("unpruned", "a", "b")
    }
    samples = [
        {"selector": name, "budget": 1.0 if name == "unpruned" else 0.5, "row": row, "score": score}
        for name, several in scores.items()
        for row, score in enumerate(several)
        if (name, row) != ("b", 49)  # a question that only one was asked
    ]
    for first in ("a", "unpruned"):
        (one,) = differences(samples, first, "b")
        interval = ttest_rel(scores["b"][:49], scores[first][:49]).confidence_interval(0.95)
        assert (one.budget, one.questions) == (0.5, 49)
        assert (one.low, one.high) == pytest.approx((interval.low, interval.high))
        assert one.mean == pytest.approx((one.low + one.high) / 2)
    with pytest.raises(ConfigError, match="share no questions; there are"):
        differences(samples, "a", "c")


def test_the_command_prints_them(tmp_path):
    file = tmp_path / "answers.jsonl"
    samples = [
        {"selector": name, "budget": 16, "row": row, "score": float(name == "b")} for name in "ab" for row in (0, 1)
    ]
    file.write_text("\n".join(map(json.dumps, samples)))
    result = CliRunner().invoke(app, ["compare", str(file), "a", "b"])
    assert result.exit_code == 0 and "b at 16: +100.0 points (+100.0 to +100.0; 2 questions)" in result.output
    file.write_text("no")
    assert "no lines of JSON" in CliRunner().invoke(app, ["compare", str(file), "a", "b"]).output
