"""Run transformers' own model tests on patched models, and compare with what they say about unpatched ones.

    pip download --no-deps --no-binary :all: transformers==5.23.0 && tar xzf transformers-5.23.0.tar.gz
    pip install parameterized requests
    python tests/support/upstream_judge.py --transformers-tests transformers-5.23.0/tests --families llava,qwen2_5_vl
    python tests/support/upstream_judge.py --transformers-tests checkout/tests --quick --without compile,export

The patch keeps all visual tokens, but every call is *forced through the gather* and the logical cache lengths, so that
each test exercises it; a test must then pass, fail or be skipped as it does without the patch. The folder is that of
the installed version: a checkout, whose file of each family is run, or the source package from PyPI, which has only
the tests common to all models; these are then given the tiny models of `tiny.py` beside this file. None of its code
is kept here. In a checkout, `src/transformers` should be the installed package (a link), since some tests read it.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import sys
import types
import unittest
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tiny import IMAGE, TINY, make_inputs
from transformers import AutoModelForImageTextToText, set_seed

from grip_hf import apply_grip
from grip_hf.engine import hooks, upstream
from grip_hf.engine.cache import CacheState

FAMILIES = ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "gemma3", "internvl", "idefics3", "paligemma", "mistral3"]
COMMON = "test_modeling_common"
# What the source package lacks, and the common tests import: classes of tests of other things.
ABSENT = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}


class Tester:
    """What the common tests want to know about one family's tiny model."""

    batch_size, is_training = 2, True

    def __init__(self, family):
        self.family = family
        self.seq_length = make_inputs(family, self.prompts)["input_ids"].shape[1]
        text = self.get_config().get_text_config()
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
            setattr(self, name, getattr(text, name))

    prompts = ([3, IMAGE, 4], [4, IMAGE, 3])

    def get_config(self):
        return TINY[self.family].config()

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), make_inputs(self.family, self.prompts)


def load_package(folder):
    """Make `folder` importable as the package `tests`, with empty stand-ins for what the source package lacks."""
    if not (folder / f"{COMMON}.py").is_file():
        raise SystemExit(f"--transformers-tests: no {COMMON}.py in {folder}")
    package = types.ModuleType("tests")
    package.__path__ = [str(folder)]
    sys.modules["tests"] = package
    sys.path.append(str(folder.parent))  # a checkout's tests import its folder `utils` too
    for name, content in ABSENT.items():
        if not (folder / (name.replace(".", "/") + ".py")).is_file():
            parent, module = types.ModuleType(f"tests.{name.split('.')[0]}"), types.ModuleType(f"tests.{name}")
            parent.__path__ = []
            setattr(module, content, type(content, (), {}))
            sys.modules.update({parent.__name__: parent, module.__name__: module})


def cases_of(folder, family):
    """The test classes for one family, and the model classes to patch."""
    path = folder / "models" / family / f"test_modeling_{family}.py"
    model_class = AutoModelForImageTextToText._model_mapping[type(TINY[family].config())]
    if path.is_file():
        module = importlib.import_module(f"tests.models.{family}.{path.stem}")
        return [one for one in vars(module).values() if _is_case(one, module)], model_class
    common = importlib.import_module(f"tests.{COMMON}")

    class Case(common.ModelTesterMixin, unittest.TestCase):
        all_model_classes = (model_class,)
        _is_composite = True

        def setUp(self):
            self.model_tester = Tester(family)

    return [Case], model_class


def _is_case(one, module):
    return isinstance(one, type) and issubclass(one, unittest.TestCase) and one.__module__ == module.__name__


@contextlib.contextmanager
def patched(model_class):
    """Every new model of this class is patched, keeps all tokens, and yet takes the way of those that do not."""
    own, make_step, trivial, calls = model_class.__init__, hooks.make_step, CacheState.trivial, []

    @functools.wraps(own)
    def init(self, *args, **kwargs):
        own(self, *args, **kwargs)
        if type(self) is model_class:
            apply_grip(self, keep_ratio=1.0, selector="grid")

    def gathered(call, choice):
        """The step that keeps all tokens, as if it did not: rows count as unequal, so that nothing is left out."""
        calls.append(1)
        if upstream.is_recurrent(call.config):  # takes no fillers: there padding goes, which shortens no test's row
            return make_step(call, types.SimpleNamespace(scores=(), keep=call.visual))
        step = make_step(call, None)
        unequal = {name: dataclasses.replace(getattr(step, name), full=False) for name in ("plan", "keys")}
        return dataclasses.replace(step, **unequal)

    model_class.__init__, hooks.make_step, CacheState.trivial = init, gathered, property(lambda self: False)
    try:
        yield calls
    finally:
        model_class.__init__, hooks.make_step, CacheState.trivial = own, make_step, trivial


class Outcomes(unittest.TestResult):
    """Test name -> "passed", "skipped" or what was raised."""

    def __init__(self):
        super().__init__()
        self.by_name = {}

    def addSuccess(self, test):
        self.by_name.setdefault(test.id().rsplit(".", 1)[1], "passed")

    def addSkip(self, test, reason):
        self.by_name[test.id().rsplit(".", 1)[1]] = "skipped"

    def addFailure(self, test, err):
        self.by_name[test.id().rsplit(".", 1)[1]] = f"{err[0].__name__}: {str(err[1]).strip()[:300]}"

    addError = addFailure

    def addSubTest(self, test, subtest, err):
        if err is not None:
            self.addFailure(test, err)


def run(cases, wanted):
    """Outcomes of the tests whose names are wanted; each draws the same numbers whenever it runs."""
    outcomes, loader = Outcomes(), unittest.TestLoader()
    drawn_from = importlib.import_module(f"tests.{COMMON}").global_rng
    for case in cases:
        for name in loader.getTestCaseNames(case):
            if wanted(name):
                set_seed(0)
                drawn_from.seed(0)
                unittest.TestSuite([case(name)]).run(outcomes)
    return outcomes.by_name


def kind(outcome):
    return outcome if outcome in ("passed", "skipped") else "failed"


def judge(folder, family, only="", without=(), quick=False):
    """Outcomes of one family's tests with the patch and without it; if quick, of those that do not pass with it."""
    cases, model_class = cases_of(folder, family)

    def wanted(name):
        return only in name and not any(part in name for part in without)

    before = {} if quick else run(cases, wanted)
    with patched(model_class) as calls:
        after = run(cases, wanted)
    if quick:
        before = {**after, **run(cases, lambda name: name in after and after[name] != "passed")}
    differ = {name: [before[name], after.get(name)] for name in before if kind(before[name]) != kind(after[name])}
    counts = {one: sum(kind(outcome) == one for outcome in after.values()) for one in ("passed", "failed", "skipped")}
    return {"family": family, **counts, "through_the_gather": len(calls), "differ": differ, "before": before}


def say(text):
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformers-tests", type=Path, required=True)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--only", default="", help="part of the names of the tests to run")
    parser.add_argument("--without", default="", help="parts of names, separated by commas, of tests that do not run")
    parser.add_argument(
        "--quick", action="store_true", help="without the patch, run those alone that do not pass with it"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    load_package(args.transformers_tests.resolve())
    rows = []
    say(f"{'family':18}{'passed':>8}{'failed':>8}{'skipped':>9}{'gathered':>10}{'differ':>8}")
    for family in args.families.split(","):
        row = judge(
            args.transformers_tests, family, args.only, list(filter(None, args.without.split(","))), args.quick
        )
        rows.append(row)
        numbers = [row[name] for name in ("passed", "failed", "skipped", "through_the_gather")]
        say("{:18}{:8}{:8}{:9}{:10}{:8}".format(family, *numbers, len(row["differ"])))
        for name, (before, after) in row["differ"].items():
            say(f"  {name}: {before} -> {after}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    wrong = [row["family"] for row in rows if row["differ"] or not row["through_the_gather"]]
    sys.exit(f"the patch changes what upstream's tests say about: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
