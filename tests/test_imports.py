"""Imports run one way, downwards, and importing does nothing else."""

import ast
import collections
import graphlib
import pathlib
import subprocess
import sys

import pytest

import grip_hf

ROOT = pathlib.Path(grip_hf.__file__).parent
TORCH_ONLY = ("engine.keepsets", "engine.plan", "engine.masks", "families.layouts", "families.tiles")
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES}


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path):
    """Names of the modules of the package that a file imports, also late, inside a function; not for types only."""
    tree = ast.parse(path.read_text())
    typed = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    skipped = {inner for node in typed for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT.parent).with_suffix("").parts[: -node.level] if node.level else ()
            module = ".".join([*package, *([node.module] if node.module else [])])
            deeper = [f"{module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("grip_hf.") in MODULES else module for name in deeper]
        else:
            continue
        yield from {name.removeprefix("grip_hf.") for name in names if name.startswith("grip_hf.")}


def order(edges):
    """The order of a graph {node: set of those before it}; fails on a circle."""
    try:
        return list(graphlib.TopologicalSorter(edges).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"imports run in a circle: {' <- '.join(error.args[1])}")


def test_folders_import_each_other_one_way():
    """Folders, and the modules that stand beside them, have an order in which each imports earlier ones alone."""
    edges = collections.defaultdict(set)
    for path in FILES:
        mine = module_of(path).split(".")[0]
        edges[mine] |= {name.split(".")[0] for name in imports(path)} - {mine}
    assert order(edges)[-1] == "cli"


def test_modules_import_each_other_one_way():
    """The same for the modules within a folder, whose `__init__` only gathers and is left out."""
    packages = {module_of(path) for path in FILES if path.name == "__init__.py"}
    order({module_of(path): set(imports(path)) - packages - {module_of(path)} for path in FILES})


def test_the_order_sees_late_imports_and_circles(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path / "grip_hf")
    monkeypatch.setitem(globals(), "MODULES", {"a", "b"})
    (tmp_path / "grip_hf").mkdir()
    for name, text in (("a", "def f():\n    from . import b\n"), ("b", "from grip_hf.a import f\n")):
        (tmp_path / "grip_hf" / f"{name}.py").write_text(text)
    edges = {name: set(imports(tmp_path / "grip_hf" / f"{name}.py")) for name in "ab"}
    assert edges == {"a": {"b"}, "b": {"a"}}
    with pytest.raises(pytest.fail.Exception, match="circle"):
        order(edges)


def imports_at_the_top(path):
    """Names of the modules that importing a file imports."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "grip_hf" if node.level else str(node.module)


@pytest.mark.parametrize("name", TORCH_ONLY)
def test_pure_functions_need_torch_alone(name):
    outside = {module.split(".")[0] for module in imports_at_the_top(ROOT / f"{name.replace('.', '/')}.py")} - {
        "grip_hf"
    }
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
from grip_hf import *
assert look() == before and torch.equal(seed, torch.get_rng_state())
assert "trl" not in sys.modules and "peft" not in sys.modules and "matplotlib" not in sys.modules
assert grip_hf.__all__ == ["GripConfig", "GripHandle", "GripScorer", "Selector", "VisualBatch", "__version__",
                           "apply_grip", "errors", "register", "remove_grip"]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
