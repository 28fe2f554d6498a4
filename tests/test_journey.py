"""The whole journey from the built wheel, for each form that people have their data in.

Train, be killed, go on, calibrate, evaluate, share, load elsewhere by what the card says, serve, ask.
"""

import base64
import json
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest
from classroom import build_vlm, rows
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from loopback_hub import WRITER, LoopbackHub, Repo
from readme import FENCED
from versions import TRAINING
from wheels import build, call, install, shell

pytestmark = [pytest.mark.slow, TRAINING]
BASE, SCORER = "maker/tiny-llava", "you/grip-tiny"
SIZES = ["--warmup-steps", "120", "--steps", "2", "--batch-size", "8", "--num-generations", "4", "--width", "16"]
SIZES += ["--warmup-batch-size", "4", "--save-steps", "5", "--eval-examples", "6", "--device", "cpu"]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return install(build(tmp_path_factory.mktemp("dist")), tmp_path_factory.mktemp("venv"))


@pytest.fixture(scope="module")
def model_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    for part in build_vlm():
        part.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pictures(folder, data):
    """The pictures as files; their names."""
    for i, row in enumerate(data):
        row["image"].save(folder / f"{i}.png")
    return [f"{i}.png" for i in range(len(data))]


def lines(place, rows):
    """One row a line."""
    place.write_text("\n".join(map(json.dumps, rows)))
    return place


def llava(folder, data):
    names = pictures(folder, data)
    turns = [
        ({"from": "human", "value": f"<image>\n{r['prompt']}"}, {"from": "gpt", "value": r["answer"]}) for r in data
    ]
    place = folder / "llava.json"
    pairs = zip(names, turns, strict=True)
    place.write_text(json.dumps([{"image": name, "conversations": pair} for name, pair in pairs]))
    return place


def messages(folder, data):
    place = folder / "rows.parquet"
    chats = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}] for row in data
    ]
    turn = {"role": Value("string"), "content": Value("string")}
    columns = {"images": [[row["image"]] for row in data], "messages": chats}
    Dataset.from_dict(columns, features=Features({"images": [ImageColumn()], "messages": [turn]})).to_parquet(place)
    return place


def questions(folder, data):
    columns = {"image": [row["image"] for row in data], "question": [row["prompt"] for row in data]}
    columns["answers"] = [[row["answer"], "else"] for row in data]
    kinds = {"image": ImageColumn(), "question": Value("string"), "answers": [Value("string")]}
    Dataset.from_dict(columns, features=Features(kinds)).save_to_disk(folder / "saved")
    return folder / "saved"


def image_folder(folder, data):
    named = zip(pictures(folder, data), data, strict=True)
    lines(folder / "metadata.jsonl", [{"file_name": name, "prompt": row["prompt"]} for name, row in named])
    return folder  # without answers


def completions(folder, data):
    named = zip(pictures(folder, data), data, strict=True)
    rows = [{"image": name, "prompt": row["prompt"], "completion": row["answer"]} for name, row in named]
    return lines(folder / "rows.jsonl", rows)


def preferences(folder, data):
    turn = {"role": Value("string"), "content": Value("string")}
    columns = {
        "images": [[row["image"]] for row in data],
        "prompt": [[{"role": "user", "content": row["prompt"]}] for row in data],
        "chosen": [[{"role": "assistant", "content": row["answer"]}] for row in data],
        "rejected": [[{"role": "assistant", "content": "else"}] for _ in data],
    }
    kinds = {"images": [ImageColumn()], "prompt": [turn], "chosen": [turn], "rejected": [turn]}
    Dataset.from_dict(columns, features=Features(kinds)).save_to_disk(folder / "saved")
    return folder / "saved"


def parts(folder, data):
    rows = []
    for name, row in zip(pictures(folder, data), data, strict=True):
        asked = [{"type": "image", "image": name}, {"type": "text", "text": row["prompt"]}]
        told = [{"type": "text", "text": row["answer"]}]
        rows.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]})
    place = folder / "rows.json"
    place.write_text(json.dumps(rows))
    return place


FORMS = {
    "LLaVA": llava,
    "messages": messages,
    "questions": questions,
    "folder": image_folder,
    "completions": completions,
    "preferences": preferences,
    "parts": parts,
}


def killed_while(words, sign, **kwargs):
    """Start a program and kill it once `sign` is there; a busy machine takes minutes to come so far."""
    running = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs)
    ends = time.monotonic() + 900
    while not sign.exists() and running.poll() is None and time.monotonic() < ends:
        time.sleep(0.02)
    assert running.poll() is None, running.stdout.read().decode()
    assert sign.exists()
    running.send_signal(signal.SIGKILL)
    running.wait()


def ask(address, picture, question):
    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 5, "temperature": 0}
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.loads(reply.read())["choices"][0]["message"]["content"]


@pytest.mark.parametrize("form", FORMS)
def test_from_a_folder_to_an_answer(form, programs, model_files, tmp_path):
    work, data = tmp_path / "work", tmp_path / "data"
    work.mkdir()
    data.mkdir()
    place = FORMS[form](data, rows(40))
    with LoopbackHub() as hub:
        hub.repos[BASE] = Repo()
        hub.repos[BASE].put(model_files)
        here = {
            **shell(programs, tmp_path / "home"),
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": WRITER,
            "OMP_NUM_THREADS": "1",
        }
        own = ["--model", BASE, "--dataset", place]

        # Train, be killed after a checkpoint, go on from it.
        train = [programs / "grip-hf", "train", *own, "--output", "run", *SIZES]
        killed_while(train, work / "run" / "warmup" / "checkpoint-10" / "trainer_state.json", cwd=work, env=here)
        said = call(*train, cwd=work, env=here)
        assert int(re.search(r"warmup: resuming from step (\d+)", said)[1]) >= 10
        assert "finished, nothing to do" in call(*train, cwd=work, env=here)

        # Find what can be promised on the same data; the scorer's folder then holds it.
        asked = ["--scorer", "run", "--quality", "0.5", "--confidence", "0.8", "--budgets", "4,8", "--examples", "30"]
        program = [programs / "grip-hf", "calibrate", *own, *asked, "--max-new-tokens", "5", "--device", "cpu"]
        assert "50.0%" in call(*program, "--json", "promise.json", cwd=work, env=here)
        (promise, *_) = json.loads((work / "promise.json").read_text())["promises"]
        assert promise["quality"] == 0.5

        # Evaluate on the same data by another metric, every answer in a file.
        files = ["--json", "table.json", "--log-samples", "answers.jsonl"]
        measure = ["--selectors", "mine=run,random", "--budgets", "0.5,4", "--metric", "contains", "--examples", "9"]
        said = call(programs / "grip-hf", "eval", *own, *measure, *files, "--device", "cpu", cwd=work, env=here)
        agreement = form == "folder"
        assert ("agreement with the full model" in said) == agreement
        assert len((work / "answers.jsonl").read_text().splitlines()) == 9 * 5
        assert json.loads((work / "table.json").read_text())["meta"]["dataset"] == str(place)

        # Share: the card knows the model, the settings and the table by itself.
        code = f"""
from grip_hf import apply_grip
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained("{BASE}")
apply_grip(model, scorer="run")
print(model.grip.push_to_hub("{SCORER}"))
"""
        assert f"{hub.url}/{SCORER}/commit/" in call(programs / "python", "-c", code, cwd=work, env=here)
        card = hub.repos[SCORER].files()["README.md"].decode()
        assert f"base_model: {BASE}" in card and "base_model_relation: adapter" in card
        assert f"| warmup_steps | `{SIZES[1]}` |" in card and "| grpo |" in card and "Citation" in card
        assert ("Agreement with the full model in %" in card) == agreement
        assert "| 50.0% | answer |" in card

        # Elsewhere, with nothing but the Hub: the snippet of the card as it stands.
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        rows(1)[0]["image"].save(elsewhere / "picture.jpg")
        rows(1)[0]["image"].save(elsewhere / "picture.png")
        (snippet,) = (body for language, body in FENCED.findall(card) if language == "python")
        question = "is there any cat"
        code = snippet.replace("What is in this picture?", question).replace("picture.jpg", "picture.png")
        there = {**here, "HF_HOME": str(tmp_path / "other")}
        wanted = call(programs / "python", "-c", code, cwd=elsewhere, env=there).strip()

        # The promise came along: at most as many looks as the ladder has, and what was kept is one of its budgets.
        code = f"""
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from grip_hf import apply_grip
model = AutoModelForImageTextToText.from_pretrained("{BASE}")
apply_grip(model, scorer="{SCORER}", quality=0.5)
inputs = AutoProcessor.from_pretrained("{BASE}")(
    images=Image.open("picture.png"), text="<image>{question}", return_tensors="pt"
)
out = model.generate(**inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
(look,), (kept,) = model.grip.last.looks, model.grip.kept_tokens(out)
rung = model.grip.promise(0.5).ladder[look - 1]
print("kept", len(kept), "of", 16 if rung == 1.0 else rung)
"""
        kept, of = re.search(
            r"kept (\d+) of (\d+)", call(programs / "python", "-c", code, cwd=elsewhere, env=there)
        ).groups()
        assert kept == of

        # Serve it, and ask what the snippet asked.
        with socket.socket() as one:
            one.bind(("localhost", 0))
            port = one.getsockname()[1]
        serve = ["serve", "--model", BASE, "--scorer", SCORER, "--port", port, "--device", "cpu"]
        server = subprocess.Popen(
            list(map(str, [programs / "grip-hf", *serve])), cwd=elsewhere, env=there, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            for _ in range(240):
                assert server.poll() is None, server.stdout.read().decode()
                try:
                    urllib.request.urlopen(f"http://localhost:{port}/health", timeout=1)
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(0.5)
            said = ask(f"http://localhost:{port}/v1/chat/completions", elsewhere / "picture.png", question)
        finally:
            server.terminate()
            server.wait(timeout=30)
        assert wanted.split()[:3] == said.split()[:3] and said.strip()
