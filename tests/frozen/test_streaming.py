"""Rows that are read as they come: those of the dataset, no more than wanted, and once."""

import itertools
import json

import datasets
import numpy as np
import pyarrow as pa
import pytest
from classroom import picture
from PIL import Image

from grip_hf.errors import DatasetError, FileError
from grip_hf.frozen.sources import load_rows
from grip_hf.frozen.streaming import BLOCK, _tables, rows_as_they_come

COUNT = 40


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def table():
    rows = [{"image": picture(i % 3).resize((16, 16)), "prompt": f"p{i}", "answer": f"a{i}"} for i in range(COUNT)]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


def as_parquet(folder):
    table().to_parquet(str(folder / "rows.parquet"))
    return str(folder / "rows.parquet")


def as_lines(folder):
    for i in range(3):
        picture(i).save(folder / f"{i}.png")
    lines = [json.dumps({"image": f"{i % 3}.png", "question": f"p{i}", "answer": f"a{i}"}) for i in range(COUNT)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return str(folder / "rows.jsonl")


def as_folder(folder):
    folder = folder / "pictures"
    (folder / "train").mkdir(parents=True)
    with (folder / "train" / "metadata.jsonl").open("w") as file:
        for i in range(COUNT):
            picture(i % 3).save(folder / "train" / f"{i}.png")
            file.write(json.dumps({"file_name": f"{i}.png", "prompt": f"p{i}", "answer": f"a{i}"}) + "\n")
    return str(folder)


def told(examples):
    return [(one.messages, one.answer) for one in (examples[i] for i in range(len(examples)))]


@pytest.mark.parametrize("make", [as_parquet, as_lines, as_folder])
def test_the_rows_of_a_dataset(tmp_path, make):
    name = make(tmp_path)
    whole, streamed = load_rows(name, limit=25), load_rows(name, limit=25, streaming=True)
    assert len(streamed) == 25 and str(streamed.format) == str(whole.format)
    for (ours, answer), (theirs, expected) in zip(told(streamed), told(whole), strict=True):
        pixels = [part["image"].tobytes() for m in (ours, theirs) for part in m[0]["content"] if "image" in part]
        assert answer == expected and len(pixels) == 2 and pixels[0] == pixels[1]
    assert isinstance(streamed[0].messages[0]["content"][0]["image"], Image.Image)
    shuffled = [answer for _, answer in told(load_rows(name, limit=25, seed=1, streaming=True))]
    assert len(set(shuffled)) == 25 and shuffled != sorted(shuffled)
    assert shuffled == [answer for _, answer in told(load_rows(name, limit=25, seed=1, streaming=True))]
    assert shuffled != [answer for _, answer in told(load_rows(name, limit=25, seed=2, streaming=True))]
    assert len(load_rows(name, limit=1000, streaming=True)) == COUNT


def endless(read):
    for i in itertools.count():
        read.append(i)
        yield {"prompt": f"p{i}", "image": {"bytes": None, "path": f"{i}.png"}}


@pytest.mark.parametrize("seed", [None, 0])
def test_no_more_than_is_wanted_and_once(tmp_path, seed):
    """Of a stream without end, which is not read a second time."""
    read = []
    stream = datasets.IterableDataset.from_generator(lambda: endless(read))
    found = rows_as_they_come(stream, 70, seed, "endless", tmp_path)
    assert len(found) == 70 and len(read) <= 70 + BLOCK
    seen = len(read)
    assert rows_as_they_come(stream, 70, seed, "endless", tmp_path)[:] == found[:] and len(read) == seen
    assert len(rows_as_they_come(stream, 71, seed, "endless", tmp_path)) == 71 and len(read) > seen


def test_memory_holds_neither_files_nor_groups_that_were_left(tmp_path):
    """What Arrow holds while rows are read, of twelve files of 3 MB each, in groups of 10 rows."""
    noise = np.random.default_rng(0)
    pictures = [{"bytes": noise.bytes(30_000), "path": None} for _ in range(100)]
    features = datasets.Features({"image": datasets.Image(), "prompt": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": pictures, "prompt": ["p"] * 100}, features=features)
    for number in range(12):
        rows.to_parquet(str(tmp_path / f"{number}.parquet"), batch_size=10)
    stream = datasets.load_dataset(str(tmp_path), split="train", streaming=True)
    before, most, seen = pa.total_allocated_bytes(), 0, 0
    for table in _tables(stream, 1000, 0):
        most, seen = max(most, pa.total_allocated_bytes() - before), seen + table.num_rows
    assert seen == 1000
    groups = 10 * 10 + 2 * BLOCK  # ten groups that rows are drawn from, the block and its copy
    assert most < 1.3 * groups * 30_000


def test_what_breaks_off_leaves_nothing(tmp_path):
    def broken():
        yield from ({"prompt": "p"} for _ in range(100))
        raise OSError("the line is cut")

    stream = datasets.IterableDataset.from_generator(broken)
    with pytest.raises(FileError, match="the line is cut"):
        rows_as_they_come(stream, 200, None, "broken", tmp_path / "rows")
    assert not list((tmp_path / "rows").iterdir())
    with pytest.raises(DatasetError, match="no rows"):
        rows_as_they_come(datasets.IterableDataset.from_generator(lambda: iter(())), 5, None, "empty", tmp_path)


def test_bad_input(tmp_path):
    with pytest.raises(DatasetError, match="needs a number of rows"):
        load_rows(as_lines(tmp_path), streaming=True)
    with pytest.raises(DatasetError, match="at least one row"):
        load_rows(as_lines(tmp_path), limit=0, streaming=True)
    with pytest.raises(DatasetError, match="has train"):
        load_rows(as_folder(tmp_path), "test", limit=3, streaming=True)
