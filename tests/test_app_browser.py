"""The page in a real browser: Debian's Chromium, headless; two of them where two people use it."""

import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from grip_hf.pocket import make_scene

APP = pathlib.Path(__file__).parents[1] / "examples" / "app.py"
FLAGS = ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync")
FLAGS += ("disable-background-networking", "disable-component-update", "window-size=1300,1150")
ALL, DELETE, ENTER = "\ue009a\ue000", "\ue017", "\ue007"  # keys: control and a, delete, enter
pytestmark = pytest.mark.slow


def wait_for(look, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(0.25)
    raise AssertionError(f"nothing after {seconds} s")


@pytest.fixture(scope="module")
def page():
    """The address of the running page."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen([sys.executable, str(APP), "--port", str(port)], env=environment)

    def answers():
        assert server.poll() is None, "the page ended"
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5).status == 200
        except OSError:
            return False

    try:
        wait_for(answers, 300)
        yield f"http://127.0.0.1:{port}"
        assert server.poll() is None, "the page ended"
    finally:
        server.terminate()
        server.wait(20)


class User:
    """Somebody before the page, in a browser of their own."""

    def __init__(self, address, profile):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for flag in (*FLAGS, f"user-data-dir={profile}"):
            options.add_argument(f"--{flag}")
        self.browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        self.browser.get(address)
        wait_for(lambda: self.find("#ask") and self.find("#picture img"))
        wait_for(self.cards)  # the page begins with an answer

    def find(self, selector):
        return self.browser.find_elements("css selector", selector)

    def see(self):
        return self.find("body")[0].text

    def fill(self, selector, text):
        box = self.find(selector)[0]
        box.send_keys(ALL, DELETE)
        box.send_keys(text)

    def choose(self, percent=None, question=None):
        if question is not None:
            self.fill("#question textarea, #question input", question)
        if percent is not None:  # last: leaving the field asks
            self.fill("#budget input[type=number]", str(percent))

    def ask(self):
        self.find("#ask")[0].click()

    def cards(self):
        """What the two cards say: (answer, tokens) of each; None while they are drawn anew."""
        try:
            cards = [card.text for card in self.find("#answers .card")]
        except Exception:  # the page has just replaced them
            return None
        found = [re.fullmatch(r".*\n(.+)\n(\d+) of 256 visual tokens .*", text) for text in cards]
        return [(one[1], int(one[2])) for one in found] if len(found) == 2 and all(found) else None

    def wait_for_tokens(self, count, seconds=120):
        wait_for(lambda: (self.cards() or [None, (None, 0)])[1][1] == count, seconds)
        return self.cards()

    def upload(self, path):
        for clear in self.find("#picture button[aria-label='Remove Image'], #picture button[aria-label='Clear']"):
            clear.click()
        wait_for(lambda: self.find("#picture input[type=file]"))[0].send_keys(str(path))


@pytest.fixture
def open_page(page, tmp_path):
    users = []

    def open_page():
        users.append(User(page, tmp_path / f"profile{len(users)}"))
        return users[-1]

    yield open_page
    for user in users:
        user.browser.quit()


def answers_of(scene, questions, percent):
    """What the library says to the same without the page, with all tokens and with a few."""
    from grip_hf import apply_grip
    from grip_hf.pocket import load_pocket_llava

    model, processor = load_pocket_llava()
    for ratio in (None, percent / 100):
        if ratio:
            apply_grip(model, keep_ratio=ratio)
        said = []
        for question in questions:
            inputs = processor(images=scene.image, text=f"<image>{question}", return_tensors="pt")
            out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            said.append(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
        yield said


def test_asking_on_the_page(open_page, tmp_path):
    user = open_page()
    assert [tokens for _, tokens in user.cards()] == [256, 28]
    wait_for(lambda: user.find("#kept img") and user.find("#scores img"))
    assert user.browser.save_screenshot(os.environ.get("GRIP_SCREENSHOT", str(tmp_path / "page.png")))

    # The ends of the slider: 1 %, and all of them, which changes nothing.
    user.choose(percent=1)
    user.ask()
    user.wait_for_tokens(3)
    user.choose(percent=100)
    user.ask()
    full, pruned = user.wait_for_tokens(256)
    assert full == pruned
    user.choose(percent=11)
    user.ask()
    user.wait_for_tokens(28)

    # An empty question is refused on the page, which goes on working.
    user.choose(question="")
    user.ask()
    wait_for(lambda: "Ask a question." in user.see())
    user.choose(question="is there any lemon", percent=25)
    user.ask()
    user.wait_for_tokens(64)


def test_broken_and_other_pictures(open_page, tmp_path):
    user = open_page()
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n no picture follows")
    user.upload(broken)
    user.choose(percent=50)
    user.ask()
    wait_for(lambda: "cannot be read as a picture" in user.see())
    scene = make_scene(9)
    scene.image.save(tmp_path / "scene.png")
    user.upload(tmp_path / "scene.png")
    question = scene.questions[2].text
    user.choose(question=question, percent=25)
    wait_for(lambda: user.find("#picture img"))
    user.ask()
    shown = user.wait_for_tokens(64)
    (full,), (pruned,) = answers_of(scene, [question], 25)
    assert shown == [(full, 256), (pruned, 64)]


def test_two_people_at_once(open_page, tmp_path):
    """Each has their own picture, question and budget, and sees their own answer."""
    people = []
    for number in (5, 6):
        user, scene = open_page(), make_scene(number)
        question = next(one.text for one in scene.questions if one.kind == "colour")
        scene.image.save(tmp_path / f"{number}.png")
        user.upload(tmp_path / f"{number}.png")
        user.choose(question=question)
        people.append((user, scene, question))
    for budgets in ((25, 50), (50, 25), (75, 25)):
        for (user, *_), percent in zip(people, budgets, strict=True):
            user.choose(percent=percent)
        for user, *_ in people:
            user.ask()
        for (user, scene, question), percent in zip(people, budgets, strict=True):
            (full,), (pruned,) = answers_of(scene, [question], percent)
            tokens = 256 * percent // 100
            assert user.wait_for_tokens(tokens) == [(full, 256), (pruned, tokens)]
