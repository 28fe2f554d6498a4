"""Files are whole or not there: a full disk is played by a limit on the size of files."""

import resource

import pytest
from PIL import Image

from grip_hf.errors import FileError
from grip_hf.files import check_folder, check_writable, make_folder, write_json, write_text, write_whole


@pytest.fixture
def full_disk():
    """No file may grow beyond 1,000 bytes; Python hears of it by `OSError`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_what_was_there(tmp_path, full_disk):
    for name, write in (
        ("a.json", lambda path: write_json(path, list(range(1000)))),
        ("a.png", lambda path: write_whole(path, Image.effect_noise((64, 64), 50).save)),
    ):
        path = tmp_path / name
        path.write_text("before")
        with pytest.raises(FileError, match=rf"{name} cannot be written, and was left as it was"):
            write(path)
        assert path.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.png"]


def test_an_interrupted_write_leaves_what_was_there(tmp_path):
    def stopped(path):
        path.write_text("half")
        raise KeyboardInterrupt

    write_text(tmp_path / "a.txt", "before")
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a.txt", stopped)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_a_file_has_the_rights_of_any_other(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "b").stat().st_mode
    assert (tmp_path / "a.json").read_text() == '{\n "a": 1\n}\n'


def test_places_that_take_no_file_are_told_before(tmp_path):
    assert check_writable(tmp_path / "a") == tmp_path / "a" and not list(tmp_path.iterdir())
    with pytest.raises(FileError, match="there is no folder"):
        check_writable(tmp_path / "none" / "a")
    with pytest.raises(FileError, match="is a folder"):
        check_writable(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileError, match=r"cannot be made: .*file is a file"):
        check_folder(tmp_path / "file" / "run" / "deep")
    assert check_folder(tmp_path / "x" / "y") == tmp_path / "x" / "y" and not (tmp_path / "x").exists()
    with pytest.raises(FileError, match="cannot be made"):
        make_folder(tmp_path / "file" / "run")
    assert make_folder(tmp_path / "a" / "b").is_dir() and not list((tmp_path / "a" / "b").iterdir())
