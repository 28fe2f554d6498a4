"""The bounds in pyproject.toml, the releases that are called tested, CI's constraints and the README's table agree."""

import re
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from readme import README, ROOT

from grip_hf.engine.upstream import TESTED

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
BOUNDS = {
    one.name: one.specifier
    for one in map(Requirement, PROJECT["dependencies"] + [line for lines in EXTRAS.values() for line in lines])
}


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def table():
    """Row name -> package -> version."""
    text = README.read_text(encoding="utf-8").split("<!-- versions -->")[1].split("<!-- /versions -->")[0]
    head, _, *rows = [cells(line) for line in text.strip().splitlines()]
    return {row[0]: dict(zip(head[2:], map(Version, row[2:]), strict=True)) for row in rows}


def printed(script):
    """What a script of CI prints."""
    command = [sys.executable, f".ci/{script}"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def constraints(name):
    """What a script of CI pins: package -> version."""
    return {package: Version(version) for package, version in (line.split("==") for line in printed(name).split())}


def lowest(name):
    return next(Version(one.version) for one in BOUNDS[name] if one.operator == ">=")


def test_the_table_has_the_columns_that_ci_prints():
    assert printed("versions").strip() in README.read_text(encoding="utf-8")
    assert list(table()) == ["lowest", "middle", "newest"]


def test_tested_releases_of_transformers():
    assert [row["transformers"] for row in table().values()] == [Version(one) for one in TESTED]
    assert lowest("transformers") == Version(TESTED[0])


def test_the_cap_is_the_minor_after_the_newest_that_is_tested():
    major, minor = Version(TESTED[-1]).release[:2]
    assert BOUNDS["transformers"].contains(f"{major}.{minor}.99")
    assert not BOUNDS["transformers"].contains(f"{major}.{minor + 1}.0")


@pytest.mark.parametrize("package", list(table()["lowest"]))
def test_versions_lie_within_the_bounds_and_the_lowest_are_the_bounds(package):
    versions = [row[package] for row in table().values()]
    assert versions == sorted(versions) and all(BOUNDS[package].contains(str(one)) for one in versions)
    assert versions[0] == lowest(package)


@pytest.mark.parametrize("name", ["lowest", "middle"])
def test_ci_installs_what_the_table_says(name):
    pinned, row = constraints(name), table()[name]
    assert {"torch", "transformers", "trl"} <= set(pinned)
    for package in set(pinned) & set(row):
        assert pinned[package] == row[package], package


def test_ci_runs_every_row():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.findall(r"^fast (\w+) ", script, re.MULTILINE) == ["lowest", "middle"] and "versions newest" in script
