"""The page in a real browser: Debian's Chromium, headless."""

import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

APP = pathlib.Path(__file__).parents[1] / "examples" / "app.py"
FLAGS = ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync")
FLAGS += ("disable-background-networking", "disable-component-update", "window-size=1300,1100")


def wait_for(look, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(0.25)
    raise AssertionError(f"nothing after {seconds} s")


@pytest.fixture
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
        wait_for(answers)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture
def browser(tmp_path):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.mark.slow
def test_asking_on_the_page(page, browser, tmp_path):
    def find(selector):
        return browser.find_elements("css selector", selector)

    def ask():
        find("#ask")[0].click()

    browser.get(page)
    wait_for(lambda: find("#ask") and find("#picture img"))
    ask()
    wait_for(lambda: "144 16" in (find("#answers table") or [browser.find_element("css selector", "body")])[0].text)
    wait_for(lambda: find("#kept img"))
    assert browser.save_screenshot(str(tmp_path / "page.png"))

    # An empty question is refused on the page, which goes on working.
    box = find("#question textarea, #question input")[0]
    box.send_keys("\ue009a\ue000", "\ue017")  # all of it selected and deleted
    ask()
    wait_for(lambda: "Ask a question." in find("body")[0].text)
    box.send_keys("is there any lemon")
    ask()
    wait_for(lambda: "144 16" in find("#answers")[0].text)
