"""The server, asked over HTTP as a client asks it."""

import base64
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from io import BytesIO

import pytest
from first_testbed import FIRST, load_pocket_llava, make_scene
from typer.testing import CliRunner

from grip_hf import apply_grip
from grip_hf.cli.app import app

pytest.importorskip("openai", reason="the extra 'serve' is not installed")


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def server():
    """The pocket model with 16 of its 144 tokens; its address, and where its log is read."""
    port = free_port()
    code = "import sys; sys.argv[0] = 'grip-hf'; from grip_hf.cli.app import app; app()"
    words = ["serve", "--pocket", *FIRST, "--budgets", "16", "--port", str(port), "--device", "cpu"]
    running = subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    address = f"http://localhost:{port}"
    try:
        for _ in range(240):
            assert running.poll() is None, running.stdout.read()
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        yield address
    finally:
        running.terminate()
        running.wait(timeout=30)


def ask(address, scene, question):
    file = BytesIO()
    scene.image.save(file, "PNG")
    picture = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": question}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 6, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.loads(reply.read())["choices"][0]["message"]["content"].strip()


@pytest.mark.slow
def test_what_is_served_is_what_the_pruned_model_says(server):
    """Also after the server has thrown its model away and loaded it again."""
    model, processor = load_pocket_llava()
    apply_grip(model, num_tokens=16)
    scene = make_scene(3)
    wanted, full = [], []
    for question in scene.questions:
        inputs = processor(images=scene.image, text=f"<image>{question.text}", return_tensors="pt")
        for answers, context in ((wanted, model.grip.budget(num_tokens=16)), (full, model.grip.disabled())):
            with context:
                out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
            said = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            answers.append(said.strip())
    assert [ask(server, scene, question.text) for question in scene.questions] == wanted
    urllib.request.urlopen(urllib.request.Request(f"{server}/reset", method="POST"), timeout=30)
    assert [ask(server, scene, question.text) for question in scene.questions] == wanted


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "either --pocket or --model"),
        (["--pocket", "--budgets", "0.5,0.2"], "takes one budget"),
        (["--pocket", "--quantize", "2bit"], "must be 4bit or 8bit"),
        (["--pocket", "--selector", "telepathy", "--budgets", "16", "--device", "cpu"], "telepathy"),
        (["--pocket", "--scorer", "/nowhere", "--device", "cpu"], "no folder '/nowhere'"),
        (["--model", "/nowhere", "--device", "cpu"], "cannot be served"),
    ],
)
def test_bad_arguments(words, message):
    done = CliRunner().invoke(app, ["serve", *words])
    assert done.exit_code == 2 and message in " ".join(done.output.replace("│", " ").split())
