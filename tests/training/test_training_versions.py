"""Training on a transformers that is too old for it: a clear error, before anything is changed or trained."""

import pytest
from classroom import build_vlm
from typer.testing import CliRunner
from versions import NO_TRAINING, TRAINING_SINCE

from grip_hf.cli.app import app
from grip_hf.engine.upstream import models, names
from grip_hf.errors import UnsupportedModelError
from grip_hf.evaluation.downsampling import check_square
from grip_hf.frozen.vlm import FrozenVLM


@pytest.fixture
def too_old(monkeypatch):
    """The version in the error: the installed one, or that of a newer one made to look like an old one."""
    if not NO_TRAINING:
        monkeypatch.setattr(models, "ENCODED", "an_argument_that_is_not_there")
        monkeypatch.setattr(names.transformers, "__version__", "5.17.0")
    return names.transformers.__version__


@pytest.mark.parametrize(
    "needs", [lambda model, processor: FrozenVLM(model, processor), lambda model, _: check_square(model)]
)
def test_the_error_names_both_versions(too_old, needs):
    model, processor = build_vlm()
    with pytest.raises(UnsupportedModelError) as caught:
        needs(model, processor)
    assert f"need transformers >= {TRAINING_SINCE}" in str(caught.value)
    assert f"transformers {too_old} is installed" in str(caught.value)
    assert not hasattr(model, "grip") and all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("command", ["train", "eval"])
def test_the_commands_say_it(too_old, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    options = ["--pocket", "--cpu", "--output", "runs"] if command == "train" else ["--pocket", "--examples", "9"]
    done = CliRunner().invoke(app, [command, *options])
    said = " ".join(done.output.replace("│", " ").split())
    assert done.exit_code == 2 and f"need transformers >= {TRAINING_SINCE}" in said, done.output
    assert f"transformers {too_old} is installed" in said and not list(tmp_path.iterdir())


@pytest.mark.skipif(NO_TRAINING, reason="the error comes, as the tests above show")
def test_a_release_that_can_train_does_not_say_it():
    FrozenVLM(*build_vlm()).close()
