"""Imports run one way, downwards, and importing does nothing else."""

import ast
import pathlib
import subprocess
import sys

import pytest

import grip_hf

ROOT = pathlib.Path(grip_hf.__file__).parent
# The level of each module or folder; a module may import its own level and lower ones.
LEVELS = {
    "errors": 0,
    "upstream": 1,
    "config": 0,
    "selection": 1,
    "pruning": 1,
    "masks": 1,
    "layout": 1,
    "grouping": 1,
    "taps": 1,
    "features": 1,
    "blocks": 1,
    "scorer": 2,
    "scenes": 2,
    "architectures": 3,
    "cache": 2,
    "budgets": 2,
    "attention": 3,
    "choose": 3,
    "inputs": 3,
    "outputs": 3,
    "calls": 3,
    "boundary": 4,
    "attached": 2,
    "card": 2,
    "download": 2,
    "resolve": 4,
    "patch": 5,
    "hub": 6,
    "viz": 6,
    "selectors": 6,
    "training": 6,
    "evaluation": 6,
    "pocket": 6,
    "cli": 7,
}
TORCH_ONLY = ("selection", "pruning", "masks", "layout", "grouping", "taps")
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def part_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_at_the_top(path):
    """(module name, level) of each import statement that runs when the module is imported."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT.parent).with_suffix("").parts[: -node.level] if node.level else ()
            module = ".".join([*package, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    mine = LEVELS.get(part_of(path), max(LEVELS.values()))
    for name in imports_at_the_top(path):
        parts = name.split(".")
        if parts[0] == "grip_hf" and len(parts) > 1 and parts[1] in LEVELS:
            assert LEVELS[parts[1]] <= mine, f"{path.name} imports {name}"


@pytest.mark.parametrize("name", TORCH_ONLY)
def test_pure_functions_need_torch_alone(name):
    outside = {module.split(".")[0] for module in imports_at_the_top(ROOT / f"{name}.py")} - {"grip_hf"}
    assert outside - set(sys.stdlib_module_names) <= {"torch"}


def test_import_has_no_side_effects():
    """No upstream class, registry of attention functions or random state is touched, and nothing is printed."""
    code = """
import random, sys, torch, transformers
from transformers import LlavaForConditionalGeneration, LlavaModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
classes = [torch.nn.Module, transformers.PreTrainedModel, LlavaForConditionalGeneration, LlavaModel]
classes += [Cache, DynamicCache]
def look():
    state = [dict(ALL_ATTENTION_FUNCTIONS), random.getstate(), torch.is_grad_enabled()]
    return [dict(vars(one)) for one in classes] + state
before, seed = look(), torch.get_rng_state()
import grip_hf
assert look() == before and torch.equal(seed, torch.get_rng_state())
assert "trl" not in sys.modules and "peft" not in sys.modules and "matplotlib" not in sys.modules
assert sorted(grip_hf.__all__) == ["GripConfig", "GripScorer", "apply_grip", "remove_grip"]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
