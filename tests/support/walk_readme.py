"""Walks through the READMEs as a newcomer types it, in one session and one folder; tests/test_wheel.py has it run.

python walk_readme.py done.json README.md ..., with the Hub that HF_ENDPOINT names. Python snippets run unchanged.
Commands run with the sizes of REDUCED put after their own arguments. What needs a GPU is left to tests/test_readme.py,
which has it parsed. What was done with each is written to done.json.
"""

import json
import subprocess
import sys
from pathlib import Path

from datasets import Dataset
from readme import FENCED, commands, module_and_arguments, without_settings
from transformers import AutoProcessor

from grip_hf.pocket import make_scene

MODEL, DATASET = "llava-hf/llava-1.5-7b-hf", "your/dataset"
WIDTH = " --width 16"
TRAIN = f"--warmup-steps 1 --steps 1 --examples 16 --batch-size 8 --num-generations 4 --warmup-batch-size 4{WIDTH}"
REDUCED = {
    "demo": "--scenes 1 --selectors grip,grid --budgets 0.25",
    "train": f"{TRAIN} --eval-examples 2 --device cpu",
    "train-tower": TRAIN,
    "eval": "--examples 9 --budgets 0.25,0.11",
    "calibrate": "--quality 0.5 --confidence 0.5 --budgets 0.25 --examples 12",
    "curve": "--quality 0.5 --confidence 0.5 --budgets 0.25 --rounds 1",
    "bench": "--model pocket2 --rounds 1 --decode-tokens 1",
    "pareto": "",
    "grip_hf.pocket.report": "--scenes 1",
    "grip_hf.pocket.train": "--see-steps 1 --speak-steps 1 --both-steps 1 --batch 2 --eval-scenes 1",
}


def run(words):
    """Run a command at its reduced size; returns what was done."""
    line = " ".join(words)
    program, *rest = without_settings(words)
    name = rest[0] if program == "grip-hf" and rest else module_and_arguments(words)[0]
    if reason := why_not(words, program, name):
        return reason, line
    changes = [word for word in words if "=" in word][: len(words) - len(rest) - 1]
    reduced = REDUCED.get(name, "")
    if "--scorer" in words:  # it has a width of its own
        reduced = reduced.replace(WIDTH, "")
    made = ["env", *changes, program, *rest, *reduced.split()]
    subprocess.run(made, check=True)
    return "ran", line


def why_not(words, program, name):
    """Why a command is not run here; None if it is. A `grip-hf` command is run unless there is a reason."""
    if program in ("pip", "pytest"):
        return "the fixtures install, and pytest is running"
    if name == "serve":
        return "runs until it is stopped; tests/test_journey.py asks it"
    if "cuda" in words:
        return "needs a GPU"
    if any(word.endswith(".py") for word in words):
        return "is in the source tree, not in the wheel"
    missing = [word for word in words if word.endswith(".json") and not Path(word).exists()]
    if name == "pareto" and missing:
        return "reads figures that nobody wrote here"
    if "--pocket-model" in words and not Path(words[words.index("--pocket-model") + 1]).exists():
        return "reads a model that a script of the source tree writes"
    return None if name in REDUCED or program == "grip-hf" else "another project's program"


def prepare():
    """What the snippets speak of without making it: `two_samples`, a batch; and a dataset of one's own."""
    scenes = [make_scene(0), make_scene(1)]
    texts = [f"<image>{scene.questions[0].text}" for scene in scenes]
    processor = AutoProcessor.from_pretrained(MODEL)
    two_samples = processor(images=[scene.image for scene in scenes], text=texts, padding=True, return_tensors="pt")
    rows = [{"image": s.image, "prompt": q.text, "answer": q.answer} for s in scenes for q in s.questions]
    Dataset.from_list(rows[:18]).save_to_disk(DATASET)
    return {"two_samples": two_samples}


def main():
    session, done = prepare(), []
    for readme in sys.argv[2:]:
        text = Path(readme).read_text(encoding="utf-8")
        for number, (language, body) in enumerate(FENCED.findall(text)):
            if language == "python":
                exec(compile(body, f"{readme}, block {number}", "exec"), session)
                done.append(("ran", body))
            elif language == "bash":
                done += map(run, commands(f"```bash\n{body}```\n"))
        done += map(run, commands(FENCED.sub("", text)))
    Path(sys.argv[1]).write_text(json.dumps(done))


if __name__ == "__main__":
    main()
