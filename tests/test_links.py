"""What an index of packages shows of the README: all links by their address, also out of a source package."""

import email
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest
from packaging.version import Version
from readme import ROOT

# The lowest release of packaging goes with older ones of hatchling alone, which cannot read this pyproject.toml.
if Version(importlib.metadata.version("hatchling")) < Version("1.27"):
    pytest.skip("the build asks for hatchling >= 1.27", allow_module_level=True)

LINKS = re.compile(r"(!?)\[[^\]]*\]\(([^)\s]+)\)")
ADDRESS = "https://example.org/somebody/grip"


def links(text):
    """(is a picture, target) of each link outside of blocks of code."""
    return [(mark == "!", target) for part in text.split("```")[::2] for mark, target in LINKS.findall(part)]


def build(kind, source, folder, **settings):
    """What a source package or a wheel, built by the backend itself, tells an index."""
    code = f"import sys; from hatchling.build import build_{kind} as build; print(build(sys.argv[1]))"
    kept = {name: value for name, value in os.environ.items() if name != "GRIP_HF_SOURCE"}
    done = subprocess.run(
        [sys.executable, "-c", code, folder],
        cwd=source,
        env=kept | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    path = folder / done.stdout.split()[-1]
    if kind == "sdist":
        with tarfile.open(path) as file:
            file.extractall(folder, filter="data")
        place = folder / path.name.removesuffix(".tar.gz")
        return place, email.message_from_bytes((place / "PKG-INFO").read_bytes())
    with zipfile.ZipFile(path) as file:
        name = next(one for one in file.namelist() if one.endswith("METADATA"))
        return path, email.message_from_bytes(file.read(name))


def test_links_become_absolute_and_stay_so_in_a_wheel_of_the_source_package(tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert any(picture for picture, _ in links(readme))
    place, told = build("sdist", ROOT, tmp_path, GRIP_HF_SOURCE=ADDRESS)
    _, again = build("wheel", place, tmp_path)
    for one in (told, again):
        assert one.get_all("Project-URL") == [f"Repository, {ADDRESS}"]
        assert one["Description-Content-Type"] == "text/markdown"
        shown = one.get_payload(decode=True).decode("utf-8")
        for picture, target in links(shown):
            begin = f"{ADDRESS}/{'raw' if picture else 'blob'}/HEAD/"
            if target.startswith(ADDRESS):
                assert target.startswith(begin) and (ROOT / target.removeprefix(begin).split("#")[0]).exists(), target
            else:
                assert target.startswith(("https://", "#")), target
        assert re.sub(rf"{ADDRESS}/(raw|blob)/HEAD/", "", shown) == readme  # nothing else is changed


def copied(place, remote):
    """What a build reads of the tree, in a checkout with a history and a remote of its own."""
    for name in (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "model_card_template.md",
        ".ci/links.py",
        "grip_hf/version.py",
    ):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(["git", "init", "-q", place], check=True)
    if remote is not None:
        subprocess.run(["git", "-C", place, "remote", "add", "origin", remote], check=True)


@pytest.mark.parametrize(
    ("remote", "shown"),
    [
        ("https://example.org/somebody/grip.git", ADDRESS),
        ("https://somebody:secret@example.org/somebody/grip", ADDRESS),
        ("git@example.org:somebody/grip.git", ADDRESS),
        ("ssh://git@example.org:2222/somebody/grip.git", ADDRESS),
        ("git@example.org:42/grip.git", "https://example.org/42/grip"),
        ("https://example.org:8443/somebody/grip.git", "https://example.org:8443/somebody/grip"),
        ("../grip", None),
        ("file:///grip.git", None),
        (None, None),
    ],
)
def test_the_address_is_that_of_the_checkout(tmp_path, remote, shown):
    """A copy with a history of its own; folders and secrets are not told."""
    copy = tmp_path / "copy"
    copied(copy, remote)
    _, told = build("sdist", copy, tmp_path)
    found = told.get_all("Project-URL")
    assert found == (None if shown is None else [f"Repository, {shown}"])
    (picture,) = [target for is_picture, target in links(told.get_payload(decode=True).decode()) if is_picture]
    assert picture.startswith(f"{shown}/raw/HEAD/" if shown else "grip_hf/")


def test_a_checkout_can_be_built_where_there_is_no_git(tmp_path):
    copy = tmp_path / "copy"
    copied(copy, "https://example.org/somebody/grip.git")
    _, told = build("sdist", copy, tmp_path, PATH=str(tmp_path))
    assert told.get_all("Project-URL") is None


def test_an_address_that_is_none_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="GRIP_HF_SOURCE must be a repository's address"):
        build("sdist", ROOT, tmp_path, GRIP_HF_SOURCE="somewhere")
