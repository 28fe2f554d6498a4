"""The README is checked against the code that it speaks of; tests/test_wheel.py runs its snippets."""

import importlib
import re
from dataclasses import fields
from importlib.metadata import metadata

import pytest
import typer
from readme import (
    README,
    ROOT,
    code_of,
    commands,
    commands_of_examples,
    fenced,
    module_and_arguments,
    parse,
    without_settings,
)
from trl import GRPOConfig, ModelConfig, ScriptArguments, SFTConfig

from grip_hf.cli.app import app
from grip_hf.families.table import FAMILIES
from grip_hf.selectors import SELECTORS

TEXT = README.read_text(encoding="utf-8")
TRAINERS = {"grip_hf.pocket.train": "train", "grip_hf.pocket.report": "report"}  # modules with a typer command
TRL_CONFIGS = (GRPOConfig, ModelConfig, ScriptArguments, SFTConfig)  # what TrlParser takes besides a script's own
FOREIGN = ("lmms_eval",)  # other projects' programs: their arguments are theirs to check


def check(words):
    """Raise unless a command names a program, extra, module or script that is there, and options that it has."""
    program, *rest = without_settings(words)
    module, arguments = module_and_arguments(words)
    scripts = [word for word in rest if word.endswith(".py")]
    if program == "grip-hf":
        parse(app, rest)
    elif module in TRAINERS:
        one = typer.Typer()
        one.command()(getattr(importlib.import_module(module), TRAINERS[module]))
        parse(one, arguments)
    elif program == "pip":
        asked = {name for word in rest for found in re.findall(r"\[(.+)\]", word) for name in found.split(",")}
        assert rest[0] == "install" and asked <= set(metadata("grip-hf").get_all("Provides-Extra"))
    elif program in ("python", "torchrun", "accelerate") and scripts:
        assert (ROOT / scripts[0]).is_file(), f"no {scripts[0]}"
        said = code_of(ROOT / scripts[0])
        own = [word[2:] for word in rest[rest.index(scripts[0]) :] if word.startswith("--")]
        known = {field.name for one in TRL_CONFIGS for field in fields(one)} if "TrlParser" in said else set()
        missing = [name for name in own if name not in said and name not in known]
        assert not missing, f"{scripts[0]} says nothing of {missing}"
    else:
        assert program == "pytest" or (module or program) in FOREIGN, f"nothing checks {words}"


@pytest.mark.parametrize("words", commands() + commands_of_examples(), ids=" ".join)
def test_every_command_can_be_given(words):
    check(words)


def test_every_command_that_is_spoken_of_is_there():
    spoken = set(re.findall(r"grip-hf ([a-z]+)", TEXT))
    assert {"demo", "train"} <= spoken <= set(typer.main.get_command(app).commands)


@pytest.mark.parametrize(
    "line",
    [
        "grip-hf bench --modle small",
        "grip-hf prune",
        "grip-hf train --pocket",
        "grip-hf demo --scenes none",
        "python -m grip_hf.pocket.report --scene 3",
        "python examples/none.py",
        "python examples/quickstart.py --budget 3",
        "pip install '.[tests]'",
        "make all",
    ],
)
def test_the_check_of_commands_finds_mistakes(line):
    (words,) = commands(f"```bash\n{line}\n```\n")
    with pytest.raises((AssertionError, typer.Exit, SystemExit, Exception)) as caught:
        check(words)
    assert not isinstance(caught.value, (KeyError, AttributeError, TypeError))


def test_the_snippets_are_python():
    snippets = fenced("python")
    assert len(snippets) >= 3
    for number, snippet in enumerate(snippets):
        compile(snippet, f"README snippet {number}", "exec")


def test_links_into_the_repository_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in link]
    assert links and not [link for link in links if not (ROOT / link).exists()]


def test_every_selector_has_its_row():
    named = {name for line in TEXT.splitlines() if line.startswith("| `") for name in re.findall(r"`(\w+)`", line)}
    ours = {name for name, cls in SELECTORS.items() if cls.__module__.startswith("grip_hf.")}  # tests register others
    assert ours - {"oracle"} <= named, sorted(ours - named)


def test_the_supported_models_are_those_of_the_registry():
    section = TEXT.split("## Supported models")[1].split("\n## ")[0]
    named = set(re.findall(r"`([a-z]\w+)`", section))
    assert named == set(FAMILIES), sorted(named ^ set(FAMILIES))
