"""Train the pocket LLaVA from nothing: `python -m grip_hf.pocket.train --output runs/pocket`.

Stage "see" teaches the tower and projector to name what lies under each visual token; stage "speak" teaches the
language model to answer; stage "both" goes on with everything. On CPU, two processes of one thread beat one of two:
`ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 -m grip_hf.pocket.train --output runs/pocket`.
A run that was stopped goes on from its last checkpoint with the same command. With `--testbed pocket2` it trains the
model of the second testbed, by the recipe in this folder's README.md; that takes a GPU minutes and a CPU days.
"""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from grip_hf.pocket.batches import Lesson, Lessons
from grip_hf.pocket.lessons import PocketTrainer
from grip_hf.pocket.lessons2 import make_trainer
from grip_hf.pocket.model import build_model, save_pocket
from grip_hf.pocket.report import accuracies
from grip_hf.pocket.testbeds import DEFAULT, POCKET, get_testbed


def learning_rate(step: int, total: int, peak: float) -> float:
    """A cosine to 2 % of the peak, times a linear warm-up over 100 steps.

    Not one of transformers' schedules, whose cosines begin after the warm-up: this is what the shipped weights had.
    """
    ramp = min(1.0, (step + 1) / 100)
    return peak * ramp * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / max(total, 1))))


def train_pocket(
    output: Annotated[Path, typer.Option(help="Folder for checkpoints and the finished model.")],
    testbed: Annotated[str, typer.Option(help='Whose model: "pocket" or "pocket2".')] = DEFAULT.name,
    see_steps: Annotated[int, typer.Option(help="Steps of stage see.")] = 1500,
    speak_steps: Annotated[int, typer.Option(help="Steps of stage speak, which pocket2 has not.")] = 2200,
    both_steps: Annotated[int, typer.Option(help="Steps of stage both.")] = 450,
    batch: Annotated[int, typer.Option(help="Scenes per step and process.")] = 16,
    rate: Annotated[float, typer.Option(help="Peak learning rate of stages see and speak.")] = 1.5e-3,
    rate_both: Annotated[float, typer.Option(help="Peak learning rate of stage both.")] = 7e-4,
    seed: Annotated[int, typer.Option(help="Seed of weights and scenes.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 200,
    eval_scenes: Annotated[int, typer.Option(help="Held-out scenes of the report after each stage.")] = 2000,
    workers: Annotated[int, typer.Option(help="Processes that draw scenes; 0 draws them in between.")] = 0,
) -> None:
    """Train the pocket LLaVA, resuming from the last checkpoint in OUTPUT if there is one."""
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(mixed_precision="bf16", kwargs_handlers=[ddp])
    set_seed(seed)
    chosen = get_testbed(testbed)
    trainer = make_trainer(build_model(seed, chosen), testbed)
    optimizer = torch.optim.AdamW(
        trainer.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.98), fused=accelerator.device.type == "cuda"
    )
    wrapped, optimizer = accelerator.prepare(trainer, optimizer)
    lessons = Lessons(batch, accelerator.process_index, accelerator.num_processes, seed, chosen)
    course = Course(accelerator, trainer, wrapped, optimizer, output / "checkpoint", lessons, workers, save_every)
    done, first = course.resume(), 0
    plan = {"see": see_steps, "speak": speak_steps, "both": both_steps}
    for stage in trainer.stages:
        steps = plan[stage]
        if done < first + steps:
            course.run(stage, first, max(done - first, 0), steps, rate_both if stage == "both" else rate)
            if accelerator.is_main_process and (stage != "see" or chosen is POCKET):
                rows = accuracies(trainer, eval_scenes)
                (output / f"accuracy_{stage}.json").write_text(json.dumps(rows, indent=2) + "\n")
                tqdm.write("  ".join(f"{kind} {row['accuracy']:.3f}" for kind, row in rows.items()))
            accelerator.wait_for_everyone()
        first += steps
    if accelerator.is_main_process:
        save_pocket(trainer.model, chosen, output / "model")
    accelerator.end_training()


@dataclass
class Course:
    """Runs stages of training on one or more processes, and keeps their checkpoint.

    Attributes:
        accelerator: Of all processes.
        trainer: The losses.
        wrapped: The same, as prepared by the accelerator.
        optimizer: As prepared by the accelerator.
        folder: Of the checkpoint.
        lessons: Batches by step.
        workers: Processes that draw scenes.
        save_every: Steps between checkpoints.
    """

    accelerator: Accelerator
    trainer: PocketTrainer
    wrapped: torch.nn.Module
    optimizer: torch.optim.Optimizer
    folder: Path
    lessons: Lessons
    workers: int
    save_every: int

    def resume(self) -> int:
        """Load the checkpoint if there is one; the number of steps done."""
        progress = self.folder / "progress.json"
        if not progress.is_file():
            return 0
        self.accelerator.load_state(str(self.folder))
        return json.loads(progress.read_text())["steps"]

    def run(self, stage: str, first: int, start: int, steps: int, peak: float) -> None:
        """Run a stage of so many steps from its step `start` on; `first` steps of earlier stages lie before it."""
        self.trainer.requires_grad_(True)
        if stage == "see":
            self.trainer.model.model.language_model.requires_grad_(False)
        batches = self.lessons.run(first + start, first + steps, self.workers)
        bar = tqdm(batches, stage, steps, initial=start, mininterval=5, disable=not self.accelerator.is_main_process)
        mean: dict[str, torch.Tensor] = {}
        for step, lesson in enumerate(bar, start):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak)
            keep = self.trainer.schedule(step / steps, stage, step)
            for name, value in self._step(lesson.to(self.accelerator.device), stage, keep).items():
                mean[name] = 0.98 * mean.get(name, value.detach()) + 0.02 * value.detach()
            if step % 50 == 0:
                bar.set_postfix({name: f"{value.item():.3f}" for name, value in mean.items()}, refresh=False)
            if (step + 1) % self.save_every == 0 or step + 1 == steps:
                self.save(first + step + 1)

    def _step(self, lesson: Lesson, stage: str, keep: float) -> dict[str, torch.Tensor]:
        with self.accelerator.autocast():
            loss, figures = self.wrapped(lesson, stage, keep)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.wrapped.parameters(), 1.0)
        self.optimizer.step()
        return {"loss": loss} | figures

    def save(self, steps: int) -> None:
        """Write a checkpoint beside the old one, then swap, so that a stop in between never leaves half of one."""
        fresh, old = self.folder.with_name("checkpoint.new"), self.folder.with_name("checkpoint.old")
        self.accelerator.save_state(str(fresh), safe_serialization=True)
        if self.accelerator.is_main_process:
            (fresh / "progress.json").write_text(json.dumps({"steps": steps}))
            shutil.rmtree(old, ignore_errors=True)
            if self.folder.exists():
                self.folder.rename(old)
            fresh.rename(self.folder)
            shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()


if __name__ == "__main__":
    typer.run(train_pocket)
