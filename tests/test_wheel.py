"""The built wheel in an environment of its own, away from the source tree: its data, its card, the README's snippets.

The environment borrows the dependencies of the one that runs the tests, so nothing is downloaded.
"""

import json
import zipfile
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from loopback_hub import WRITER, LoopbackHub, Repo
from readme import READMES, ROOT, commands, fenced
from wheels import build, call, install, shell

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parent / "support"
MODEL, SCORER, PRUNED = "llava-hf/llava-1.5-7b-hf", "you/grip-llava-1.5-7b", "you/llava-1.5-7b-grip"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def programs(wheel, tmp_path_factory):
    return install(wheel, tmp_path_factory.mktemp("venv"))


@pytest.fixture
def environment(programs, tmp_path):
    return shell(programs, tmp_path / "home")


def test_everything_that_is_read_at_run_time_is_in_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert "grip_hf/model_card_template.md" in names and "grip_hf/py.typed" in names
    files = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("grip_hf/**/*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    assert files <= names, sorted(files - names)
    assert not [name for name in names if name.startswith(("tests/", "examples/")) or name.endswith((".pyc", ".bin"))]


def test_the_card_is_rendered_from_the_wheel(programs, environment, tmp_path):
    code = """
import grip_hf
from grip_hf import apply_grip
from grip_hf.pocket import load_pocket_llava
apply_grip(load_pocket_llava()[0], keep_ratio=0.25).grip.save_pretrained("folder")
print(grip_hf.__file__)
"""
    place = call(programs / "python", "-c", code, cwd=tmp_path, env={**environment, "HF_HUB_OFFLINE": "1"})
    assert Path(place.strip()).is_relative_to(programs.parent)
    card = ModelCard.load(tmp_path / "folder" / "README.md")
    assert card.data.library_name == "grip_hf" and "25% of the visual tokens" in card.text and "{{" not in card.text


def test_every_snippet_of_the_readmes_runs(programs, environment, tmp_path):
    """With the pocket model on a Hub on loopback, under the names that the READMEs use."""
    from grip_hf.pocket.model import WEIGHTS

    work = tmp_path / "work"
    work.mkdir()
    walk = tmp_path / "walk"
    walk.mkdir()
    for name in ("readme.py", "walk_readme.py"):  # these two alone: neither the tests nor the package lie beside them
        (walk / name).write_text((TESTS / name).read_text())
    with LoopbackHub() as hub:
        for name, folder in ((MODEL, WEIGHTS), (SCORER, WEIGHTS / "grip")):
            hub.repos[name] = Repo()
            hub.repos[name].put({path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
        variables = {**environment, "HF_ENDPOINT": hub.url, "HF_TOKEN": WRITER}
        call(programs / "python", walk / "walk_readme.py", walk / "done.json", *READMES, cwd=work, env=variables)
        uploaded = {name: hub.repos[name].files() for name in (SCORER, PRUNED)}
    done = json.loads((walk / "done.json").read_text())
    ran = {line for what, line in done if what == "ran"}
    assert len(done) == len(fenced("python")) + len(commands()) and set(fenced("python")) <= ran
    assert sum(line.startswith("grip-hf") for line in ran) >= 5

    card = ModelCard(uploaded[SCORER]["README.md"].decode())
    assert card.data.base_model == MODEL and f'apply_grip(model, scorer="{SCORER}")' in card.text
    assert {"model.safetensors", "config.json", "grip/model.safetensors"} <= set(uploaded[PRUNED])
