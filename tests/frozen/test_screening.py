"""Bad rows before the first step, and a hold-out that shares no picture with training."""

import numpy as np
import pytest
from classroom import picture
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn

from grip_hf.errors import DatasetError
from grip_hf.frozen import screening
from grip_hf.frozen.data import DatasetExamples
from grip_hf.frozen.screening import hold_out, screen
from grip_hf.frozen.sources import load_rows


def write(folder, count=60, broken=50, empty=55):
    """A folder with pictures and one JSON lines file; one picture is cut off, one answer is empty."""
    folder.mkdir()
    lines = []
    for i in range(count):
        picture(i // 2).save(folder / f"{i}.png")
        lines.append({"image": f"{i}.png", "prompt": "what", "answer": "" if i == empty else "cat"})
    whole = (folder / f"{broken}.png").read_bytes()
    (folder / f"{broken}.png").write_bytes(whole[: len(whole) // 2])
    Dataset.from_list(lines).to_json(folder / "rows.jsonl")
    return str(folder / "rows.jsonl")


def test_bad_rows_are_named_before_the_first_step(tmp_path):
    examples = load_rows(write(tmp_path / "data"))
    with pytest.raises(DatasetError, match=r"2 of 60 rows cannot be used: row 50: a picture does not decode.*row 55"):
        screen(examples, progress=False)
    found = screen(examples, "skip", progress=False)
    assert list(found.bad) == [50, 55] and len(found.examples) == len(found.groups) == 58
    assert found.examples.places[50, 0] == 51
    # Two questions to a picture, in a row; rows 51 and 54 are alone.
    whole = [row // 2 for row in found.examples.places[:, 0].tolist()]
    assert len(set(zip(whole, found.groups.tolist(), strict=True))) == len(set(whole)) == len(set(found.groups)) == 30
    with pytest.raises(DatasetError, match="on_bad_row must be 'stop' or 'skip', got 'hide'"):
        screen(examples, "hide")


def test_a_dataset_is_read_once(tmp_path, monkeypatch):
    examples = load_rows(write(tmp_path / "data"))
    fresh = screen(examples, "skip", tmp_path / "rows.npz", progress=False)
    monkeypatch.setattr(screening, "_read", lambda *_: pytest.fail("it was read again"))
    again = screen(examples, "skip", tmp_path / "rows.npz", progress=False)
    assert again.bad == fresh.bad and np.array_equal(again.groups, fresh.groups)
    with pytest.raises(pytest.fail.Exception):
        screen(examples.subset(range(3)), "skip", tmp_path / "rows.npz", progress=False)


def test_all_rows_bad_cannot_be_skipped(tmp_path):
    examples = DatasetExamples([{"image": str(tmp_path / "none.png"), "prompt": "what"}] * 2, probe=0)
    with pytest.raises(DatasetError, match="2 of 2 rows"):
        screen(examples, "skip", progress=False)


@pytest.mark.parametrize("stored", ["pictures", "bytes"])
def test_the_hold_out_shares_no_picture(stored):
    """Six rows to a picture, in a row; the split is drawn by seed."""
    rows = [{"image": picture(i // 6), "prompt": "what", "answer": str(i)} for i in range(60)]
    kinds = Features({"image": ImageColumn(), "prompt": Value("string"), "answer": Value("string")})
    data = rows if stored == "pictures" else Dataset.from_list(rows, features=kinds)
    found = screen(DatasetExamples(data), progress=False)
    seen = set()
    for seed in range(3):
        train, held = hold_out(found, 15, seed)
        sides = [{int(row) // 6 for row in side.places[:, 0]} for side in (train, held)]
        assert len(held) == 15 and not sides[0] & sides[1]
        assert len(train) == 6 * len(sides[0]) and len(sides[0]) + len(sides[1]) == 10
        again = hold_out(found, 15, seed)
        assert np.array_equal(again[1].places, held.places) and np.array_equal(again[0].places, train.places)
        seen.add(tuple(sorted(sides[1])))
    assert len(seen) == 3 and (7, 8, 9) not in seen


def test_pictures_that_appear_together_stay_together():
    a, b, c, d = map(picture, range(4))
    rows = [{"images": pair, "prompt": "what"} for pair in ([a, b], [b, c], [c], [d], [d])]
    train, held = hold_out(screen(DatasetExamples(rows), progress=False), 2, 0)
    assert len(held) == 2
    sides = [set(side.places[:, 0].tolist()) for side in (train, held)]
    assert all(side <= {0, 1, 2} or side <= {3, 4} for side in sides)


def test_too_small_a_dataset_names_the_option():
    found = screen(DatasetExamples([{"image": picture(0), "prompt": "what"}] * 5), progress=False)
    with pytest.raises(DatasetError, match=r"5 usable questions about 1 pictures.*smaller --eval-examples"):
        hold_out(found, 2)
