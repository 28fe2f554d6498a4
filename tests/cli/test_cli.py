"""The command line, on the shipped pocket model."""

import json
import subprocess
import sys
from importlib import metadata

import pytest
from first_testbed import FIRST, load_pocket_llava, make_scene
from typer.testing import CliRunner

import grip_hf
from grip_hf.cli import options
from grip_hf.cli.app import app
from grip_hf.pocket.testbeds import DEFAULT, TESTBEDS

runner = CliRunner()


def test_demo_shows_what_the_model_says(tmp_path):
    data, picture = tmp_path / "demo.json", tmp_path / "kept.png"
    words = ["--scenes", "1", "--seed", "3", "--selectors", "grid", "--budgets", "0.25", "--keep-ratio", "0.11"]
    result = runner.invoke(app, ["demo", *FIRST, *words, "--picture", str(picture), "--json", str(data)])
    assert result.exit_code == 0, result.output
    shown = json.loads(data.read_text())
    scene = make_scene(3)
    assert [row["question"] for row in shown["table"]] == [question.text for question in scene.questions]
    assert {row["kept"] for row in shown["table"]} == {16} and picture.stat().st_size > 10_000

    # The unpruned column is what a model that was never patched generates.
    model, processor = load_pocket_llava()
    for row, question in zip(shown["table"], scene.questions, strict=True):
        inputs = processor(images=scene.image, text=f"<image>{question.text}", return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        said = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert row["full"] == said

    unpruned = shown["summary"][0]
    right = sum(row["full"] == row["truth"] for row in shown["table"])
    assert unpruned["selector"] == "none" and (unpruned["right"], unpruned["asked"]) == (right, len(scene.questions))
    assert shown["summary"][1]["tokens"] == 36


def test_the_options_name_the_testbeds_that_there_are():
    assert set(options.TESTBEDS) == set(TESTBEDS) and DEFAULT.name == options.TESTBED


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--testbed", "pocket3"], "must be one of pocket2, pocket, got 'pocket3'"),
        (["--keep-ratio", "0"], "(0, 1]"),
        (["--budgets", "0.5,much"], "'much'"),
        (["--selectors", "gird"], "'gird'"),
        (["--scenes", "0"], "--scenes"),
        (["--picture", "nowhere/kept.png"], "nowhere"),
    ],
)
def test_bad_options_are_named_and_nothing_is_written(words, said, tmp_path):
    picture = tmp_path / "kept.png"
    result = runner.invoke(app, ["demo", *FIRST, "--picture", str(picture), *words])
    assert result.exit_code == 2 and said in result.output and not picture.exists()


def test_every_command_has_help():
    result = runner.invoke(app, ["--help"])
    assert "Fewer visual tokens" in result.output
    for command in ("demo", "bench", "eval", "train"):
        assert command in result.output
        assert runner.invoke(app, [command, "--help"]).exit_code == 0


def test_help_waits_for_no_model_library():
    """Each command's help is written without torch, transformers or numpy."""
    code = """
import sys
from typer.testing import CliRunner
from grip_hf.cli.app import app
for words in ([], *([name] for name in ("bench", "demo", "doctor", "eval", "pareto", "serve", "train"))):
    assert CliRunner().invoke(app, [*words, "--help"]).exit_code == 0
assert not {"torch", "transformers", "numpy", "trl", "datasets"} & set(sys.modules), sorted(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]


def test_a_picture_is_whole_or_not_there(tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    picture = tmp_path / "kept.png"
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
        words = ["--scenes", "1", "--selectors", "grid", "--budgets", "0.25", "--picture", str(picture)]
        result = runner.invoke(app, ["demo", *FIRST, *words])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.exit_code == 1 and "cannot be written" in result.output and not list(tmp_path.iterdir())


def test_the_version_is_that_of_the_installed_package():
    result = runner.invoke(app, ["--version"])
    assert result.exit_code == 0 and result.output == f"grip-hf {metadata.version('grip-hf')}\n"
    assert grip_hf.__version__ == metadata.version("grip-hf")
