"""One run of `grip-hf train`, from the model and the rows to a folder that can be used and shared as it is."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from ..evaluation.facts import versions
from ..evaluation.memory import peak_memory
from ..evaluation.runner import evaluate
from ..evaluation.tasks import named_selectors
from ..files import make_folder, write_json
from ..frozen.screening import hold_out
from ..frozen.sources import TRAIN_SPLITS
from ..frozen.store import SampleStore
from ..frozen.vlm import FrozenVLM
from ..hub.share import write_card
from ..patch import apply_grip, remove_grip
from ..pocket.examples import PocketExamples
from ..training.pipeline import train_scorer
from ..training.plan import TrainingPlan, read_plan
from .loading import ModelChoice, load_examples
from .report import show, write_table
from .screen import say

TABLE = "eval_table.json"
ROWS, BAD_ROWS, PICTURES = "rows.npz", "bad_rows.json", "pictures"
BUDGETS = (0.5, 0.25, 0.11, 0.05, 0.03)
TRIAL_STEPS = 4  # the first is not timed


@dataclasses.dataclass
class Job:
    """What one run needs.

    Args:
        choice: The model.
        plan: What to do.
        split: Split of the dataset; None takes one for training.
        on_bad_row: What a row that cannot be read does.
        metric: Metric of the table.
        held_out: How many questions the table asks; 0 makes none.
        streaming: Whether rows are read as they come.
        pictures: Folder for encoded pictures that is kept; None keeps none.
    """

    choice: ModelChoice
    plan: TrainingPlan
    split: str | None
    on_bad_row: str
    metric: str
    held_out: int
    streaming: bool = False
    pictures: Path | None = None

    @property
    def shared(self) -> Path | None:
        """The folder in which processes share encoded pictures; a single one shares none unless it is told where."""
        several = PartialState().num_processes > 1
        return self.pictures or (self.plan.output / PICTURES if several else None)

    def load(self, cache: Path | None) -> tuple[FrozenVLM, Any, Any]:
        """The frozen model, the examples to train on, and those to evaluate on (or None)."""
        held_out, seed = self.held_out, self.plan.seed
        if self.choice.dataset is None:
            train: Any = PocketExamples(self.plan.data["examples"], seed, testbed=self.choice.testbed)
            held: Any = PocketExamples(held_out, seed, "test", self.choice.testbed) if held_out else None
        else:
            limit = self.plan.data["examples"] + held_out
            if cache is not None:
                make_folder(cache)
            rows = cache and cache / ROWS
            screened = load_examples(
                self.choice.dataset, self.split, limit, seed, self.on_bad_row, TRAIN_SPLITS, rows, self.streaming
            )
            if cache is not None and screened.bad and PartialState().is_main_process:
                write_json(cache / BAD_ROWS, screened.bad)
            train, held = screened.examples, None
            if held_out:
                train, held = hold_out(screened, held_out, seed)
        return FrozenVLM(*self.choice.load(), share=self.pictures if cache is None else self.shared), train, held

    def run(self) -> None:
        """Train, write the table, and make the folder one that `apply_grip` takes."""
        output = self.plan.output
        vlm, train, held = self.load(output)
        train_scorer(self.plan, SampleStore(vlm, train), say=say)
        vlm.close()
        if held is not None:
            self.table(vlm, held)
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            if self.pictures is None:
                shutil.rmtree(output / PICTURES, ignore_errors=True)
            apply_grip(vlm.model, scorer=output)
            try:
                write_card(vlm.model.grip, output)  # it tells what the folder knows
            finally:
                remove_grip(vlm.model)
            say(f"the scorer is in {output}: apply_grip(model, scorer={str(output)!r})")

    def table(self, vlm: FrozenVLM, held: Any) -> None:
        """Evaluate each stage's scorer and write the table, unless it is there already."""
        path, state = self.plan.output / TABLE, PartialState()
        known = read_plan(self.plan.output)
        meta = {
            **self.choice.facts(), "dataset": self.choice.dataset, "split": self.split, "examples": len(held),
            "seed": self.plan.seed, "plan": known, "budgets": list(BUDGETS),
            "asked_metric": self.metric, "versions": versions(),
        }  # fmt: skip
        if (there := _read(path)) and {**there["meta"], "metric": None} == {**meta, "metric": None}:
            if state.is_main_process:
                say(f"the table is in {path}")
            return
        stages = [name for name in self.plan.stages() if (self.plan.output / name / "scorer").is_dir()]
        specs = [f"{name}={self.plan.output / name / 'scorer'}" for name in stages]
        pocket = self.choice.dataset is None
        names = [*specs, "random", "grid", "similarity", *(["oracle"] if pocket else [])]
        selectors = named_selectors(names, self.plan.seed, pocket, self.choice.testbed)
        found = evaluate(
            vlm.model, vlm.processor, held, selectors, BUDGETS, 16,
            processes=state, metric=self.metric, share=self.shared,
        )  # fmt: skip
        if state.is_main_process:
            show(found)
            write_table(path, found, meta)


def _read(path: Path) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if {"meta", "rows"} <= set(found) else None
    except (OSError, ValueError, TypeError):
        return None


class Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: dict[int, list[float]] = {}
        self.start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step begins."""
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step has ended."""
        self.seconds.setdefault(id(args), []).append(time.perf_counter() - self.start)


def estimate(job: Job) -> None:
    """Run a few steps of each stage in a folder that is thrown away; print memory, and the time of the whole run."""
    vlm, train, held = job.load(None)
    say(f"{len(train)} questions to train on, {0 if held is None else len(held)} held out")
    weights = sum(weight.nbytes for weight in vlm.model.parameters())
    say(f"the model takes {weights / 2**30:.2f} GiB")
    clock, plan = Clock(), job.plan
    wanted = {plan.method: plan.steps, "warmup": plan.warmup_steps}
    with tempfile.TemporaryDirectory() as folder, peak_memory(vlm.device) as peak:
        trial = dataclasses.replace(
            plan,
            output=Path(folder),
            warmup_steps=min(TRIAL_STEPS, plan.warmup_steps),
            steps=min(TRIAL_STEPS, plan.steps),
        )
        scorer = train_scorer(trial, SampleStore(vlm, train), [clock])
        most = peak()
    say(f"the scorer has {sum(weight.numel() for weight in scorer.parameters()):,} parameters")
    hours = 0.0
    for name, seconds in zip(trial.stages(), clock.seconds.values(), strict=True):
        later = seconds[1:] or seconds
        each = sum(later) / len(later)
        hours += each * wanted[name] / 3600
        mean = f"the mean of {len(later)}, after one of {seconds[0]:.2f} s"
        say(f"{name}: {wanted[name]} steps of {each:.2f} s ({mean})")
    if most is not None:
        say(f"at most {most / 2**30:.2f} GiB were taken at once")
    told = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
    say(f"about {told} in all, without the table and without encoding pictures again that memory cannot hold")
