import pytest
from classroom import picture, rows
from datasets import Dataset
from PIL import Image

from grip_hf.frozen.data import DatasetError, DatasetExamples
from grip_hf.frozen.sources import SourceError, load_model, load_rows


def test_a_dataset_gives_conversations_with_pictures_inside():
    messages = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]},
    ]
    data = [
        {"images": [picture(0), picture(1)], "prompt": "what", "answer": None, "extra": 3},
        {"images": [picture(2)], "prompt": messages, "answer": "yes", "extra": 4},
    ]
    examples = DatasetExamples(data)
    first, second = examples[0], examples[1]
    assert [part["type"] for part in first.messages[0]["content"]] == ["image", "image", "text"]
    assert first.answer is None and first.columns == {"extra": 3}
    assert second.messages[0] == {"role": "system", "content": [{"type": "text", "text": "be short"}]}
    assert [part["type"] for part in second.messages[1]["content"]] == ["text", "image", "text"]
    assert isinstance(second.messages[1]["content"][1]["image"], Image.Image) and second.answer == "yes"
    assert messages[1]["content"][1] == {"type": "image"}, "the dataset's own row was changed"


def test_a_saved_dataset_loads(tmp_path):
    Dataset.from_list(rows(4)).save_to_disk(tmp_path / "data")
    examples = load_rows(str(tmp_path / "data"), "train", limit=3)
    assert len(examples) == 3 and examples[2].columns == {"kind": "k2"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no rows"),
        ([{"prompt": "a"}], "'image' or 'images'"),
        ([{"image": 1}], "'prompt'"),
        ([{"image": None, "prompt": "a"}], "row 0: there is no picture"),
        ([{"images": [], "prompt": "a"}], "row 0: there is no picture"),
        ([{"image": __file__, "prompt": "a"}], "row 0: a picture does not decode"),
        ([{"image": picture(0), "prompt": ""}], "row 0: prompt must"),
        ([{"image": picture(0), "prompt": [{"role": "assistant", "content": "a"}]}], "row 0: prompt must"),
        ([{"image": picture(0), "prompt": "a", "answer": 3}], "row 0: answer must be text"),
        (
            [{"image": picture(0), "prompt": [{"role": "user", "content": [{"type": "image"}] * 2}]}],
            "row 0: there are 1 pictures for 2",
        ),
    ],
)
def test_bad_rows_fail_at_once(data, message):
    with pytest.raises(DatasetError, match=message):
        DatasetExamples(data)


def test_a_broken_picture_in_a_dataset_names_its_row():
    good = {"image": {"bytes": open_bytes(picture(0)), "path": None}, "prompt": "a"}
    bad = {"image": {"bytes": b"no picture", "path": None}, "prompt": "a"}
    from datasets import Features, Value
    from datasets import Image as ImageColumn

    data = Dataset.from_list([good, bad], features=Features({"image": ImageColumn(), "prompt": Value("string")}))
    with pytest.raises(DatasetError, match="row 1: a picture does not decode"):
        DatasetExamples(data)


def open_bytes(image):
    from io import BytesIO

    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_missing_sources(tmp_path):
    with pytest.raises(DatasetError, match=r"cannot load the dataset .* \(split 'train'\)"):
        load_rows(str(tmp_path / "none"), "train")
    with pytest.raises(SourceError, match="cannot load the model"):
        load_model(str(tmp_path / "none"))
    with pytest.raises(SourceError, match="4bit or 8bit"):
        load_model(str(tmp_path), quantize="2bit")
