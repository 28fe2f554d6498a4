"""What pruning saves in a vLLM server: requests per second, time to first token and KV blocks, beside stock vLLM.

    python examples/serving/bench.py --shape small --json serving.json

Two servers run on this machine, one with and one without GRIP; every figure is the median of rounds in which all
variants take turns. Weights are random, which costs as much time as trained ones. Every request brings a picture of
its own, so that nothing comes from a cache.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import math
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import openai
import torch
from PIL import Image
from shapes import write_checkpoint

from grip_hf.evaluation.shapes import get_shape

STOCK = "vLLM"


@contextlib.contextmanager
def server(folder: Path, *options: str, dtype: str, length: int):
    """Start `vllm serve`; gives its address once it answers, and stops it at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("vllm"), "serve", folder, "--port", str(port), "--dtype", dtype]
    command += ["--max-model-len", str(length), "--served-model-name", "shape", "--no-enable-prefix-caching"]
    command += ["--trust-request-mm-kwargs", *options]
    with open(folder / f"{port}.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(1200):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=2)
                break
            if process.poll() is not None:
                raise SystemExit(f"vllm serve stopped:\n{(folder / f'{port}.log').read_text()[-3000:]}")
            time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def picture(rng: np.random.Generator, side: int) -> str:
    """A picture of its own as a data URL."""
    blocks = rng.integers(0, 255, (side // 8, side // 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize((side, side)).save(file, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


async def load(url: str, budget: float | None, bodies: list, concurrent: int, tokens: int) -> dict:
    """Send requests, so many at a time: requests per second, times to first token, tokens of a prompt."""
    gate, firsts, prompts = asyncio.Semaphore(concurrent), [], []
    extra = {"ignore_eos": True} | (
        {} if budget is None else {"mm_processor_kwargs": {"grip": {"keep_ratio": budget}}}
    )

    async def one(client: openai.AsyncOpenAI, content: list) -> None:
        async with gate:
            begin = time.perf_counter()
            stream = await client.chat.completions.create(
                model="shape",
                messages=[{"role": "user", "content": content}],
                max_tokens=tokens,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body=extra,
            )
            first = None
            async for part in stream:
                if part.choices and first is None:  # vLLM opens a stream with the first token
                    first = time.perf_counter() - begin
                if part.usage:
                    prompts.append(part.usage.prompt_tokens)
            firsts.append(first)

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=0) as client:
        begin = time.perf_counter()
        await asyncio.gather(*(one(client, content) for content in bodies))
        seconds = time.perf_counter() - begin
    return {"rate": len(bodies) / seconds, "ttft": [1000 * first for first in firsts], "prompt": prompts[0]}


def block_size(url: str) -> int:
    """Tokens of a KV block."""
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    return int(re.search(r'cache_config_info\{.*?block_size="(\d+)"', text)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="small", help="a LLaVA shape of grip-hf bench")
    parser.add_argument("--budgets", default="0.5,0.25,0.11", help="keep ratios")
    parser.add_argument("--concurrent", default="1,8,32", help="requests at a time")
    parser.add_argument("--requests", type=int, default=32, help="per round; at least twice those at a time are sent")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of an answer")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="without torch.compile, whose start takes minutes")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    shape = get_shape(asked.shape)
    budgets = [float(one) for one in asked.budgets.split(",")]
    rng = np.random.default_rng(asked.seed)
    vocabulary = shape.text["vocab_size"]

    def bodies(count: int) -> list:
        side = shape.vision["image_size"]
        texts = [" ".join(f"w{word}" for word in rng.integers(10, vocabulary - 10, shape.words)) for _ in range(count)]
        image = [{"type": "image_url", "image_url": {"url": picture(rng, side)}} for _ in range(count)]
        return [[one, {"type": "text", "text": text}] for one, text in zip(image, texts, strict=True)]

    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_checkpoint(shape, folder, getattr(torch, asked.dtype), asked.seed)
        length = min(2048, shape.text["max_position_embeddings"])
        usual = {"dtype": asked.dtype, "length": length}
        eager = ["--enforce-eager"] if asked.eager else []
        with (
            server(folder, "--hf-overrides", '{"grip": false}', *eager, **usual) as stock,
            server(folder, *eager, **usual) as pruning,
        ):
            size = block_size(stock)
            variants = [(STOCK, stock, None), *((f"{budget:.0%}", pruning, budget) for budget in budgets)]
            for _, url, budget in variants:  # warm up
                asyncio.run(load(url, budget, bodies(4), 2, asked.tokens))
            for concurrent in map(int, asked.concurrent.split(",")):
                found = {name: [] for name, *_ in variants}
                for _ in range(asked.rounds):
                    for name, url, budget in variants:
                        count = max(asked.requests, 2 * concurrent)
                        found[name].append(asyncio.run(load(url, budget, bodies(count), concurrent, asked.tokens)))
                for name, rounds in found.items():
                    times = [first for one in rounds for first in one["ttft"]]
                    rate = statistics.median(one["rate"] for one in rounds)
                    base = statistics.median(one["rate"] for one in found[STOCK])
                    prompt = rounds[0]["prompt"]
                    row = {
                        "concurrent": concurrent,
                        "kept": name,
                        "requests_per_s": rate,
                        "lowest": min(one["rate"] for one in rounds),
                        "highest": max(one["rate"] for one in rounds),
                        "gain": rate / base,
                        "ttft_p50_ms": float(np.percentile(times, 50)),
                        "ttft_p99_ms": float(np.percentile(times, 99)),
                        "prompt_tokens": prompt,
                        "kv_blocks": math.ceil((prompt + asked.tokens) / size),
                    }
                    rows.append(row)
                    print("  ".join(f"{key} {value:.4g}" if key != "kept" else value for key, value in row.items()))
    result = {"setting": {**vars(asked), "json": None, "block_size": size, "cpus": os.cpu_count()}, "rows": rows}
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
