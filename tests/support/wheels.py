"""The built wheel in an environment of its own, which borrows the dependencies of the one that runs the tests."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from readme import ROOT


def call(*words, **kwargs):
    """Run a program to its end; what it printed."""
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(folder):
    """Build the wheel into a folder."""
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    call(sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", folder, ROOT)
    (path,) = folder.glob("*.whl")
    return path


def install(wheel, venv):
    """The folder of programs of a new environment with the wheel in it."""
    call(sys.executable, "-m", "venv", "--without-pip", venv)
    pip = (sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "install", "--quiet")
    call(*pip, "--no-deps", "--no-index", wheel)
    (packages,) = venv.glob("lib/python*/site-packages")
    borrowed = [place for place in sys.path if Path(place).name in ("site-packages", "dist-packages")]
    (packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n")  # read after the environment's own packages
    return venv / "bin"


def shell(programs, home):
    """What a newcomer's shell has: the programs on the path, and nothing of the source tree."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
    path = f"{programs}{os.pathsep}{kept['PATH']}{os.pathsep}{sysconfig.get_path('scripts')}"
    return {**kept, "PATH": path, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
