"""How much memory rows take until training starts: loaded or streamed, checked and split.

    python tests/support/memory_of_rows.py --rows 1000,10000,100000
    python tests/support/memory_of_rows.py --rows 1000,10000,100000 --streaming

Makes a dataset of that many rows, each with a picture of its own (96 x 96 pixels), in a temporary folder, and measures
in a fresh process for each number: the anonymous memory beyond what the same takes for 40 rows, which is mostly that
of the libraries.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

SIDE, SHARD = 96, 2_000
GROUP = 100  # rows that Parquet reads at once, as files with pictures on the Hub have them


def make(folder, count, seed=0):
    """Parquet files with `count` rows; a few at a time are in memory."""
    from datasets import Dataset, Features, Value
    from datasets import Image as Picture

    features = Features({"image": Picture(), "prompt": Value("string"), "answer": Value("string")})
    rng = np.random.default_rng(seed)
    for start in range(0, count, SHARD):
        rows = []
        for number in range(start, min(start + SHARD, count)):
            pixels = rng.integers(0, 256, (SIDE // 8, SIDE // 8, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).resize((SIDE, SIDE)).save(file, "png")
            picture = {"bytes": file.getvalue(), "path": None}
            rows.append({"image": picture, "prompt": f"what is in picture {number}", "answer": f"thing {number}"})
        Dataset.from_list(rows, features=features).to_parquet(
            str(folder / f"train-{start:09}.parquet"), batch_size=GROUP
        )


def anonymous():
    """MiB of memory of this process that no file stands behind."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) / 1024


def measure(folder, count, streaming):
    """Load or stream, check and split, as `grip-hf train` does; prints a line of JSON."""
    import datasets

    from grip_hf.frozen.screening import hold_out, screen
    from grip_hf.frozen.sources import load_rows

    def run(place, rows):
        datasets.config.HF_DATASETS_CACHE = Path(place) / "cache"
        examples = load_rows(str(place), limit=rows, seed=0, streaming=streaming)
        return hold_out(screen(examples, progress=False), min(450, rows // 10))

    with tempfile.TemporaryDirectory() as few:
        make(Path(few), 40)
        run(few, 40)
    start, before, most = time.monotonic(), anonymous(), [0.0]
    done = threading.Event()

    def watch():
        while not done.wait(0.05):
            most[0] = max(most[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    train, held = run(folder, count)
    done.set()
    watcher.join()
    found = {"rows": len(train) + len(held), "start": before, "end": anonymous() - before, "most": most[0] - before}
    sys.stdout.write(json.dumps({**found, "seconds": time.monotonic() - start}) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1000,10000,100000")
    parser.add_argument("--streaming", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure, int(args.rows), args.streaming)
        return
    sys.stdout.write("| rows | memory at the end, MiB | at most, MiB | time, s |\n|--:|--:|--:|--:|\n")
    for count in map(int, args.rows.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), count)
            words = [sys.executable, __file__, "--measure", folder, "--rows", str(count)]
            words += ["--streaming"] if args.streaming else []
            found = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
        sys.stdout.write("| {rows:,} | {end:.0f} | {most:.0f} | {seconds:.0f} |\n".format(**found))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
