"""The forms in which people have their data: what is found where, question by question."""

import base64
import json
from io import BytesIO

import pytest
from classroom import picture
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from PIL import Image

from grip_hf.errors import DatasetError
from grip_hf.frozen.data import DatasetExamples
from grip_hf.frozen.sources import load_rows


def user(*content):
    return {"role": "user", "content": list(content) if len(content) > 1 else content[0]}


def assistant(text):
    return {"role": "assistant", "content": text}


def text(words):
    return {"type": "text", "text": words}


def png(number):
    file = BytesIO()
    picture(number).save(file, "PNG")
    return file.getvalue()


def shape(example):
    """What an example asks: roles, parts (pictures as their first pixel's place in the file) and answers."""
    told = [(one["role"], [part.get("text", "<picture>") for part in one["content"]]) for one in example.messages]
    return told, example.answers


ONE = ([("user", ["<picture>", "what"])], ("cat",))
FORMS = {
    "prompt + answer": ({"image": picture(0), "prompt": "what", "answer": "cat"}, [ONE]),
    "question + answers": ({"image": picture(0), "question": "what", "answers": ["cat", "a cat"]},
                           [(ONE[0], ("cat", "a cat"))]),
    "VQA": ({"image": picture(0), "question": "what", "multiple_choice_answer": "cat",
             "answers": [{"answer": "dog", "id": 1}, {"answer": "cat", "id": 2}, {"answer": "cat", "id": 3}]},
            [(ONE[0], ("cat", "cat", "dog"))]),
    "answer beside answers": ({"image": picture(0), "question": "what", "answer": "cat", "answers": ["dog", "cat"]},
                              [(ONE[0], ("cat", "dog"))]),
    "images + messages": ({"images": [picture(0)], "messages": [user("what"), assistant("cat")]}, [ONE]),
    "structured messages": ({"images": [picture(0)],
                             "messages": [user({"type": "image"}, text("what")), assistant([text("cat")])]}, [ONE]),
    "pictures in the parts": ({"messages": [user({"type": "image", "image": picture(0)}, text("what")),
                                            assistant("cat")]}, [ONE]),
    "data URL in the parts": ({"messages": [user(
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(png(0)).decode()}},
        text("what")), assistant("cat")]}, [ONE]),
    "LLaVA": ({"image": picture(0), "conversations": [{"from": "human", "value": "<image>\nwhat"},
                                                      {"from": "gpt", "value": "cat"}]}, [ONE]),
    "prompt + completion": ({"image": picture(0), "prompt": "what", "completion": " cat"}, [(ONE[0], (" cat",))]),
    "chat prompt + completion": ({"images": [picture(0)], "prompt": [user("what")], "completion": [assistant("cat")]},
                                 [ONE]),
    "preference": ({"images": [picture(0)], "prompt": [user("what")], "chosen": [assistant("cat")],
                    "rejected": [assistant("dog")]}, [ONE]),
    "implicit preference": ({"images": [picture(0)], "chosen": [user("what"), assistant("cat")],
                             "rejected": [user("what"), assistant("dog")]}, [ONE]),
    "no answer": ({"image": picture(0), "prompt": "what"}, [(ONE[0], ())]),
    "several turns": ({"images": [picture(0), picture(1)], "messages": [
        {"role": "system", "content": "be short"}, user("<image>what"), assistant("cat"), user("<image> and now"),
        assistant("dog")]},
        [([("system", ["be short"]), ("user", ["<picture>", "what"])], ("cat",)),
         ([("system", ["be short"]), ("user", ["<picture>", "what"]), ("assistant", ["cat"]),
           ("user", ["<picture>", "and now"])], ("dog",))]),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_form_asks_the_same(name):
    row, wanted = FORMS[name]
    examples = DatasetExamples([row, row])
    assert [shape(examples[i]) for i in range(len(examples))] == wanted * 2
    shown = [part["image"] for one in examples[0].messages for part in one["content"] if "image" in part]
    assert [one.tobytes() for one in shown] == [picture(0).tobytes()]
    assert examples[0].answer == (wanted[0][1] or (None,))[0]


def test_the_majority_of_several_answers_is_trained_on():
    row = {"image": picture(0), "question": "what", "answers": ["dog", "cat", "cat"]}
    assert DatasetExamples([row])[0].answers == ("cat", "cat", "dog")


def test_what_was_found_is_told_and_nothing_is_dropped_in_silence():
    row = {"image": picture(0), "question": "what", "answer": "cat", "response": "a cat", "id": 7}
    told = str(DatasetExamples([row]).format)
    assert "questions: 'question'; answers: 'answer'; not used: 'response', 'id'" in told
    assert DatasetExamples([row])[0].columns == {"response": "a cat", "id": 7}


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet", "mixed.json", "folder", "disk"])
def test_files_with_paths_beside_them(form, tmp_path, monkeypatch):
    """Paths are relative to the file, wherever the program runs."""
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    for i in range(3):
        picture(i).save(tmp_path / "data" / "pictures" / f"{i}.png")
    turns = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "cat"}]
    data = [{"id": i, "image": f"pictures/{i}.png", "conversations": turns} for i in range(3)]
    place = tmp_path / "data" / ("rows." + form)
    if form == "json":
        place.write_text(json.dumps(data))
    elif form == "jsonl":
        place.write_text("\n".join(map(json.dumps, data)))
    elif form == "parquet":
        Dataset.from_list(data).to_parquet(str(place))
    elif form == "mixed.json":  # no column of one type
        data[1]["conversations"] = [{"from": "human", "value": [{"type": "image"}, text("what")]}, turns[1]]
        place.write_text(json.dumps(data))
    elif form == "folder":
        place = tmp_path / "data"
        lines = [{"file_name": f"pictures/{i}.png", "prompt": "what", "answer": "cat"} for i in range(3)]
        (place / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    else:
        pictures = [str(tmp_path / "data" / one["image"]) for one in data]
        rows = {"image": pictures, "prompt": ["what"] * 3, "answer": ["cat"] * 3}
        features = Features({"image": ImageColumn(), "prompt": Value("string"), "answer": Value("string")})
        Dataset.from_dict(rows, features=features).save_to_disk(place)
    monkeypatch.chdir("/")
    examples = load_rows(str(place))
    assert [shape(examples[i]) for i in range(3)] == [ONE] * 3
    assert examples[2].messages[0]["content"][0]["image"].tobytes() == picture(2).tobytes()


def test_a_photo_is_turned_upright(tmp_path):
    lying = Image.new("RGB", (4, 2), (255, 0, 0))
    exif = lying.getexif()
    exif[0x0112] = 6
    lying.save(tmp_path / "a.jpg", exif=exif)
    example = DatasetExamples([{"image": str(tmp_path / "a.jpg"), "prompt": "what"}])[0]
    assert example.messages[0]["content"][0]["image"].size == (2, 4)


def test_pictures_sorted_into_classes_are_refused_with_a_hint(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        picture(0).save(tmp_path / name / "a.png")
    with pytest.raises(DatasetError, match=r"sorted into classes.*metadata.jsonl"):
        load_rows(str(tmp_path))


def test_the_split_that_is_there_is_taken(tmp_path):
    row = {"image": picture(0), "prompt": "what"}
    from datasets import DatasetDict

    for number, names in enumerate((["validation"], ["train", "test"], ["a", "b"])):
        DatasetDict({name: Dataset.from_list([row] * (i + 1)) for i, name in enumerate(names)}).save_to_disk(
            tmp_path / str(number)
        )
    assert len(load_rows(str(tmp_path / "0"))) == 1
    assert len(load_rows(str(tmp_path / "1"))) == 1 and len(load_rows(str(tmp_path / "1"), wanted=["test"])) == 2
    with pytest.raises(DatasetError, match=r"has the splits a, b: choose one with --split"):
        load_rows(str(tmp_path / "2"))
    with pytest.raises(DatasetError, match=r"it has a, b"):
        load_rows(str(tmp_path / "2"), "train")
