"""`grip-hf doctor`."""

import json

import pytest
import torch
import transformers
from first_testbed import WEIGHTS
from tiny import EVERY
from transformers import AutoConfig
from typer.testing import CliRunner

from grip_hf import GripConfig, apply_grip, patch
from grip_hf.cli.app import app
from grip_hf.doctor import tiny
from grip_hf.engine.upstream import names

runner = CliRunner()


def doctor(*options):
    return runner.invoke(app, ["doctor", *map(str, options)])


@pytest.fixture
def fault(monkeypatch):
    def compacted(model, selector, ratio):
        return apply_grip(model, GripConfig(keep_ratio=ratio, position_ids="compact"), selector=selector).grip

    monkeypatch.setattr(patch, "prune", compacted)


def test_a_few_families(tmp_path):
    result = doctor("--families", "llava, paligemma2", "--json", tmp_path / "found.json")
    assert result.exit_code == 0, result.output
    assert "pruning works here: 2 of 2" in result.output and "paligemma2, static cache" in result.output
    assert (
        f"transformers {transformers.__version__}" in result.output and f"torch {torch.__version__}" in result.output
    )
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["passed"] and found["absent"] == []
    assert found["setting"] == {"device": "cpu", "dtype": "float32", "attention": "sdpa"}
    assert {"python", "torch", "transformers", "trl", "peft", "accelerate"} <= set(found["versions"])
    assert [one["family"] for one in found["families"]] == ["llava", "paligemma2"]
    status = {one["check"]: one["status"] for one in found["families"][1]["findings"]}
    assert status["static cache"] == "absent" and status["dynamic cache"] == "passed"


@pytest.mark.slow
def test_all_families(tmp_path):
    result = doctor("--json", tmp_path / "found.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert sorted([*(one["family"] for one in found["families"]), *found["absent"]]) == EVERY


def test_a_fault_is_shown_and_exits_with_one(fault, tmp_path):
    result = doctor("--families", "llava,qwen2_vl", "--json", tmp_path / "found.json")
    assert result.exit_code == 1
    assert "do not prune here: 0 of 2" in result.output and "logits differ" in result.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert not found["passed"]
    (prefill,) = (one for one in found["families"][0]["findings"] if one["check"] == "prefill")
    assert prefill["status"] == "failed" and prefill["error"] > prefill["allowed"]
    assert "not defined" in found["families"][1]["findings"][1]["message"]  # M-RoPE has no compact positions


def test_a_model(tmp_path):
    result = doctor(WEIGHTS)
    assert result.exit_code == 0 and "llava" in result.output and "1 of 1" in result.output
    AutoConfig.for_model("llava", text_config=transformers.MistralConfig()).save_pretrained(tmp_path)
    result = doctor(tmp_path, "--dtype", "bfloat16", "--attention", "eager")
    assert result.exit_code == 0 and "mistral" in result.output and "bfloat16" in result.output


def test_absent_families_are_no_errors(monkeypatch, tmp_path):
    monkeypatch.setattr(tiny, "CONFIG_MAPPING", {"llava": None})
    result = doctor("--families", "llava,qwen3_5", "--json", tmp_path / "found.json")
    assert result.exit_code == 0 and "not in this release of transformers: qwen3_5" in result.output
    assert json.loads((tmp_path / "found.json").read_text())["absent"] == ["qwen3_5"]


def test_a_newer_release_is_told(monkeypatch):
    monkeypatch.setattr(names.transformers, "__version__", "5.999.0")
    result = doctor("--families", "llava")
    assert result.exit_code == 0 and "transformers 5.999.0 is installed" in result.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--families", "lava"], "'lava'"),
        (["--families", ","], "--families"),
        (["--device", "gpu"], "'gpu'"),
        (["--dtype", "int8"], "'int8'"),
        (["--attention", "flash"], "'flash'"),
        (["nowhere", "--families", "llava"], "not both"),
        (["no/such/model/here"], "no/such/model/here"),
    ],
)
def test_bad_options_are_named(options, said):
    result = doctor(*options)
    assert result.exit_code == 2 and said in result.output, result.output


def test_an_unsupported_model_is_named(tmp_path):
    transformers.BertConfig().save_pretrained(tmp_path)
    result = doctor(tmp_path)
    assert result.exit_code == 2 and "'bert'" in result.output and "llava" in result.output
