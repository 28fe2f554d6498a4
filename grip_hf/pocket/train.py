"""Train the pocket LLaVA from nothing: `python -m grip_hf.pocket.train --output runs/pocket`.

Stage "see" teaches the tower and projector to name what lies under each visual token; stage "speak" teaches the
language model to answer; stage "both" goes on with everything. On CPU, two processes of one thread beat one of two:
`ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 -m grip_hf.pocket.train --output runs/pocket`.
A run that was stopped goes on from its last checkpoint with the same command.
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

from grip_hf.pocket.lessons import Lesson, PocketTrainer, lessons
from grip_hf.pocket.model import build_model, build_processor
from grip_hf.pocket.names import name_for_all_readers
from grip_hf.pocket.report import accuracies

STAGES = ("see", "speak", "both")


def learning_rate(step: int, total: int, peak: float) -> float:
    """Linear warm-up over 100 steps, then a cosine to 2 % of the peak."""
    ramp = min(1.0, (step + 1) / 100)
    return peak * ramp * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / max(total, 1))))


def train(
    output: Annotated[Path, typer.Option(help="Folder for checkpoints and the finished model.")],
    see_steps: Annotated[int, typer.Option(help="Steps of stage see.")] = 1500,
    speak_steps: Annotated[int, typer.Option(help="Steps of stage speak.")] = 2200,
    both_steps: Annotated[int, typer.Option(help="Steps of stage both.")] = 450,
    batch: Annotated[int, typer.Option(help="Scenes per step and process.")] = 16,
    rate: Annotated[float, typer.Option(help="Peak learning rate of stages see and speak.")] = 1.5e-3,
    rate_both: Annotated[float, typer.Option(help="Peak learning rate of stage both.")] = 7e-4,
    seed: Annotated[int, typer.Option(help="Seed of weights and scenes.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 200,
    eval_scenes: Annotated[int, typer.Option(help="Held-out scenes of the report after each stage.")] = 2000,
) -> None:
    """Train the pocket LLaVA, resuming from the last checkpoint in OUTPUT if there is one."""
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(mixed_precision="bf16", kwargs_handlers=[ddp])
    set_seed(seed)
    trainer = PocketTrainer(build_model(seed))
    optimizer = torch.optim.AdamW(trainer.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    wrapped, optimizer = accelerator.prepare(trainer, optimizer)
    course = Course(accelerator, trainer, wrapped, optimizer, output / "checkpoint", batch, seed, save_every)
    done, first = course.resume(), 0
    for stage, steps in zip(STAGES, (see_steps, speak_steps, both_steps), strict=True):
        if done < first + steps:
            course.run(stage, first, max(done - first, 0), steps, rate_both if stage == "both" else rate)
            if accelerator.is_main_process:
                rows = accuracies(trainer, eval_scenes)
                (output / f"accuracy_{stage}.json").write_text(json.dumps(rows, indent=2) + "\n")
                tqdm.write("  ".join(f"{family} {row['accuracy']:.3f}" for family, row in rows.items()))
            accelerator.wait_for_everyone()
        first += steps
    if accelerator.is_main_process:
        trainer.model.bfloat16().save_pretrained(output / "model")
        name_for_all_readers(output / "model" / "model.safetensors")
        build_processor().save_pretrained(output / "model")
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
        batch: Scenes per step and process.
        seed: Of the scenes.
        save_every: Steps between checkpoints.
    """

    accelerator: Accelerator
    trainer: PocketTrainer
    wrapped: torch.nn.Module
    optimizer: torch.optim.Optimizer
    folder: Path
    batch: int
    seed: int
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
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        batches = lessons(first + start, first + steps, self.batch, rank, world, self.seed)
        bar = tqdm(batches, stage, steps, initial=start, mininterval=5, disable=rank > 0)
        mean: dict[str, float] = {}
        for step, lesson in enumerate(bar, start):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak)
            self.trainer.guidance = 1.0 if step < steps // 2 else 0.3
            keep = 1.0 if stage == "see" or step % 3 else float(torch.rand(()) * 0.7 + 0.3)
            for name, value in self._step(lesson, stage, keep).items():
                mean[name] = 0.98 * mean.get(name, value.item()) + 0.02 * value.item()
            bar.set_postfix({name: f"{value:.3f}" for name, value in mean.items()}, refresh=False)
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
    typer.run(train)
