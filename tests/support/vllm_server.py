"""A real `vllm serve` on loopback.

with serve(folder, "--hf-overrides", '{"grip": {...}}') as server:
    server.client.chat.completions.create(model=server.model, ...)
"""

import base64
import contextlib
import dataclasses
import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

SHIM = Path(__file__).parent.parent / "serving" / "shim"


@dataclasses.dataclass(frozen=True)
class Server:
    url: str
    model: str
    process: Any
    log: Path

    def client(self, kind="OpenAI"):
        import openai

        return getattr(openai, kind)(base_url=f"{self.url}/v1", api_key="none", timeout=120, max_retries=0)

    def metrics(self):
        """Counters and gauges by name, summed over their labels."""
        found = {}
        for line in urllib.request.urlopen(f"{self.url}/metrics").read().decode().splitlines():
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                found[name.split("{")[0]] = found.get(name.split("{")[0], 0) + float(value)
        return found


def command(folder, port, *options):
    usual = ["--port", str(port), "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"]
    usual += ["--max-model-len", "512", "--served-model-name", "pocket"]
    return [str(Path(sys.executable).parent / "vllm"), "serve", str(folder), *usual, *options]


def environment():
    path = os.pathsep.join([str(SHIM), *filter(None, [os.environ.get("PYTHONPATH")])])
    quiet = {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    return {
        **os.environ,
        **quiet,
        "PYTHONPATH": path,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }


@contextlib.contextmanager
def serve(folder, log, *options, seconds=400):
    """Start a server and wait until it answers; at the end it and all its processes are stopped."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command(folder, port, *options), stdout=out, stderr=out, env=environment(), start_new_session=True
        )
    try:
        server = Server(f"http://127.0.0.1:{port}", "pocket", process, Path(log))
        deadline = time.monotonic() + seconds
        while not answers(server.url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{Path(log).read_text()[-4000:]}")
            time.sleep(0.5)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(url):
    try:
        return urllib.request.urlopen(f"{url}/health", timeout=2).status == 200
    except OSError:
        return False


def refused(folder, log, *options, seconds=400):
    """What a server says that does not start; fails if it does."""
    with open(log, "wb") as out:
        done = subprocess.run(command(folder, 1, *options), stdout=out, stderr=out, env=environment(), timeout=seconds)
    assert done.returncode != 0
    return Path(log).read_text()


def message(picture, text):
    """A user's message with a picture as a data URL."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}],
    }
