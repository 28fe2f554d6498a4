"""Plant realistic faults, one at a time, and see which of them our tests notice.

    python tests/support/planted.py                  # all; some minutes per ten faults
    python tests/support/planted.py crop temperature # those whose name has one of these words

Each fault goes into a temporary copy of the tree, whose tests run there; the tree itself is never touched. A fault
that survives asks for a test. The tests that notice it must pass without it, which is tried first.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable

from planted_faults import FAULTS, Fault

ROOT = pathlib.Path(__file__).parents[2]
COPIED = ("grip_hf", "tests", "examples", "pyproject.toml", "README.md", "model_card_template.md")
SECONDS = 900  # a fault may also make a test run on and on
PRELOADED = ["torch", "pytest", "transformers.trainer", "transformers.models.llava.modeling_llava"]


def place_of(fault: Fault, root: pathlib.Path = ROOT) -> str:
    """The text of the file that a fault goes into.

    Raises:
        ValueError: The old text does not stand there exactly once.
    """
    text = (root / fault.file).read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.name!r}: the old text stands {text.count(fault.old)} times in {fault.file}")
    return text


def plant(fault: Fault, root: pathlib.Path) -> None:
    """Plant a fault in a copy of the tree."""
    text = place_of(fault, root)
    (root / fault.file).write_text(text.replace(fault.old, fault.new), encoding="utf-8")


def notice(fault: Fault | None, tests: Iterable[str], seconds: float = SECONDS) -> bool:
    """Whether tests fail with a fault (None: without any).

    Raises:
        RuntimeError: The tests did not run at all.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, root / name)
        if fault is not None:
            plant(fault, root)
        # A fresh process each, forked from one that has the large imports.
        fork = multiprocessing.get_context("forkserver")
        fork.set_forkserver_preload(PRELOADED)
        process = fork.Process(target=_run, args=(str(root), tuple(tests)))
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            return True
        if process.exitcode not in (0, 1):
            output = (root / "output.txt").read_text(encoding="utf-8")
            raise RuntimeError(f"the tests did not run (code {process.exitcode}):\n{output[-2000:]}")
        return process.exitcode == 1


def _run(root: str, tests: tuple[str, ...]) -> None:
    """Run tests in a copy of the tree; ends the process with pytest's code."""
    os.chdir(root)
    sys.path[:] = [root, *(path for path in sys.path if pathlib.Path(path or ".").resolve() != ROOT / "tests/support")]
    os.environ.update(PYTHONPATH=root, PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
    import pytest

    with open("output.txt", "w", encoding="utf-8") as out, contextlib.redirect_stdout(out):
        code = pytest.main([*tests, "-x", "-n", "0", "-p", "no:cacheprovider"])
        import grip_hf

        assert pathlib.Path(grip_hf.__file__).is_relative_to(root), grip_hf.__file__
    os._exit(int(code))


def main(words: list[str]) -> int:
    """Try the faults whose name has one of the words, or all; returns how many survive."""
    chosen = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]
    for fault in chosen:
        place_of(fault)
    passing: set[tuple[str, ...]] = set()
    survive = []
    for fault in chosen:
        start = time.monotonic()
        if fault.tests not in passing and notice(None, fault.tests):
            raise RuntimeError(f"{', '.join(fault.tests)} fail without a fault")
        passing.add(fault.tests)
        noticed = notice(fault, fault.tests)
        survive += [] if noticed else [fault]
        _say(f"{'noticed ' if noticed else 'SURVIVES'} {fault.name} ({time.monotonic() - start:.0f} s)")
    _say(f"{len(chosen) - len(survive)} of {len(chosen)} faults are noticed")
    return len(survive)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(min(main(sys.argv[1:]), 100))
