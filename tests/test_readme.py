"""The READMEs are checked against the code that they speak of; tests/test_wheel.py runs their snippets."""

import importlib
import re
from dataclasses import fields
from importlib.metadata import metadata

import pytest
import typer
from readme import (
    README,
    READMES,
    ROOT,
    code_of,
    commands,
    commands_of_examples,
    everything,
    fenced,
    module_and_arguments,
    parse,
    without_settings,
)
from trl import GRPOConfig, ModelConfig, ScriptArguments, SFTConfig

from grip_hf.cli.app import app
from grip_hf.cli.train import upstream_options
from grip_hf.families.table import FAMILIES
from grip_hf.hub.resolve import LEARNED, TRAINING_FREE
from grip_hf.selectors import SELECTORS

TEXT = everything()
PAGES = {path.parent.name: path.read_text(encoding="utf-8") for path in READMES}
OURS = {name: cls for name, cls in SELECTORS.items() if cls.__module__.startswith("grip_hf.")}  # tests register more
TRAINERS = {"grip_hf.pocket.train": "train_pocket", "grip_hf.pocket.report": "report"}  # modules with a typer command
TRAINERS["grip_hf.calibration.head"] = "main"
APPS = ("grip_hf.calibration.draws",)  # modules with a typer app
TRL_CONFIGS = (GRPOConfig, ModelConfig, ScriptArguments, SFTConfig)  # what TrlParser takes besides a script's own
FOREIGN = ("lmms_eval", "vllm")  # other projects' programs: their arguments are theirs to check


def check(words):
    """Raise unless a command names a program, extra, module or script that is there, and options that it has."""
    program, *rest = without_settings(words)
    module, arguments = module_and_arguments(words)
    scripts = [word for word in rest if word.endswith(".py")]
    if program == "grip-hf":
        found = parse(app, rest)
        if found.info_name == "train":  # it leaves further options to TRL's parser
            upstream_options(found.args, found.params["method"])
    elif module in TRAINERS:
        one = typer.Typer()
        one.command()(getattr(importlib.import_module(module), TRAINERS[module]))
        parse(one, arguments)
    elif module in APPS:
        parse(importlib.import_module(module).app, arguments)
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
        "grip-hf train --pocket --output runs/a --warmup-stps 3",
        "grip-hf train --pocket --output runs/a --method relaxed --top-entropy-quantile 0.5",
        "grip-hf demo --scenes none",
        "python -m grip_hf.pocket.report --scene 3",
        "python examples/none.py",
        "python examples/quickstart.py --pictures 3",
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


def test_the_first_snippet_runs_as_it_stands_and_prints_what_its_comments_say(capsys):
    first = fenced("python", README.read_text(encoding="utf-8"))[0]
    exec(compile(first, "README, first snippet", "exec"), {})
    told = re.findall(r"^print\(.*\)  # (\S+)", first, re.MULTILINE)
    assert capsys.readouterr().out.split() == told == ["white", "28"]


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


def anchors(path):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", READMES, ids=lambda page: page.parent.name)
def test_links_into_the_repository_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")) if "://" not in link]
    for link in links:
        target, _, anchor = link.partition("#")
        place = page.parent / target if target else page
        assert place.exists(), link
        assert not anchor or anchor in anchors(place), link
    assert links


def test_every_page_is_reached_from_the_readme():
    said = README.read_text(encoding="utf-8")
    assert not [page for page in READMES[1:] if page.relative_to(ROOT).as_posix() not in said]


def test_every_selector_has_its_row():
    rows = [line for line in PAGES["selectors"].splitlines() if line.startswith("| `")]
    named = {name for line in rows for name in re.findall(r"`(\w+)`", line)}
    assert set(OURS) <= named, sorted(set(OURS) - named)


def accuracies(page):
    """Right answers in % by selector, a number per budget, from the first such table of a page, one a testbed."""
    table = PAGES[page].split("| visual tokens kept |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (\w+)(?: \([^|]*\))? \| ([^\n]*) \|$", table, re.MULTILINE)
    return {name: [float(cell) for cell in cells.split(" | ")] for name, cells in rows}


def test_the_default_is_the_best_of_those_that_need_no_training_and_nothing_of_the_tower():
    """The rule that `apply_grip` states, applied to the figures of both testbeds."""
    both = [accuracies(page) for page in ("evaluation", "pocket")]
    for found in both:
        assert set(found) - {"pooled"} == set(OURS) - {LEARNED} and all(len(row) == 5 for row in found.values())
    variants = {"cdpruner_max"}  # ours, not a published method
    plain = {name for name, cls in OURS.items() if not cls.needs and not cls.inside} - {LEARNED} - variants
    assert {"similarity", "diversity", "cdpruner", "grid", "random"} <= plain
    assert max(plain, key=lambda name: sum(sum(found[name]) for found in both)) == TRAINING_FREE


def test_the_figures_of_the_first_table_are_those_of_the_evaluation():
    first = re.findall(
        r"^\| \**(\w+)\**,?[^|]*((?:\| (?:[\d.]+ %|–) ){3})\|$", README.read_text("utf-8"), re.MULTILINE
    )
    times = PAGES["evaluation"].split("## How much time at equal accuracy?")[1]
    assert len(first) == 5
    for name, cells in first:
        *told, time = re.findall(r"[\d.]+|–", cells)
        for page, right in zip(("evaluation", "pocket"), told, strict=True):
            row = re.search(rf"^\| \**{name}\**[^|]*(\| [^|]+){{2}}\| ([\d.]+)", PAGES[page], re.MULTILINE)
            unmeasured = (name, page) == ("pyramiddrop", "pocket")  # by its present rule
            assert right == ("–" if unmeasured else row[2]), (page, name)
        assert re.search(rf"^\| {name} \| [\d.]+ \| [\d.]+ \| {re.escape(time)} ", times, re.MULTILINE), name


def test_the_supported_models_are_those_of_the_registry():
    section = PAGES["families"].split("<!-- families -->")[1].split("<!-- /families -->")[0]
    named = set(re.findall(r"^\| `([a-z]\w+)`", section, re.MULTILINE))
    assert named == set(FAMILIES), sorted(named ^ set(FAMILIES))
    [count] = re.findall(r"Over (\d+) model types", README.read_text(encoding="utf-8"))
    assert len(FAMILIES) > int(count)
