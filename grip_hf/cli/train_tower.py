"""`grip-hf train-tower`: a tower scorer for the pocket model, or for a model and dataset of your own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .loading import ModelChoice, load_examples
from .screen import failures, numbers, quiet, say


def train_tower(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Folder of the run; going on with an unfinished one is automatic.")],
    pocket: options.Pocket = False,
    model: options.Model = None,
    dataset: options.Dataset = None,
    split: options.Split = None,
    scorer: Annotated[
        str | None, typer.Option(help="Folder of the scorer that teaches; else the one that came with the model.")
    ] = None,
    tower_depth: options.TowerDepth = None,
    tower_keep_ratio: Annotated[float, typer.Option(help="Share of the rows that the settings are saved with.")] = 0.5,
    keep_ratio: Annotated[
        float, typer.Option(help="Share of the visual tokens that stay while it is trained.")
    ] = 0.11,
    warmup_steps: Annotated[int, typer.Option(min=0, help="Steps of the warm-up.")] = 0,
    steps: Annotated[int, typer.Option(min=0, help="Steps of GRPO.")] = 500,
    warmup_batch_size: Annotated[int, typer.Option(min=1, help="Examples per warm-up step.")] = 32,
    batch_size: Annotated[int, typer.Option(min=1, help="Keep-sets per GRPO step.")] = 64,
    num_generations: Annotated[int, typer.Option(min=2, help="Keep-sets per example.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of GRPO.")] = 1e-3,
    warmup_learning_rate: Annotated[float, typer.Option(help="Peak learning rate of the warm-up.")] = 2e-3,
    budgets: Annotated[
        str, typer.Option(help="Smallest and largest share of the rows, separated by a comma.")
    ] = "0.12,0.6",
    width: Annotated[int, typer.Option(min=1, help="Width of the tower scorer.")] = 32,
    examples: Annotated[int, typer.Option(min=1, help="Questions to train on (of a dataset: at most).")] = 30_000,
    on_bad_row: options.OnBadRow = "stop",
    seed: options.Seed = 0,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 250,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    attn_implementation: options.Attention = None,
    pocket_model: options.PocketModel = None,
    testbed: options.Testbed = options.TESTBED,
) -> None:
    """Train what chooses the rows that leave the vision tower, for a scorer that chooses among the tokens left."""
    choice = ModelChoice.of(context)
    quiet()
    low_high = numbers(budgets, wanted="--budgets: numbers")
    if len(low_high) != 2:
        raise typer.BadParameter(f"--budgets needs 2 numbers separated by commas, got {budgets!r}")
    shared: dict[str, Any] = {"report_to": "none", "use_cpu": device == "cpu", "disable_tqdm": not sys.stderr.isatty()}
    with failures():
        from ..errors import ScorerError
        from ..files import check_folder
        from ..frozen.sources import TRAIN_SPLITS
        from ..hub.checkpoint import attached_folder
        from ..pocket.examples import PocketExamples
        from ..scorer.model import GripScorer
        from ..training.plan import TrainingPlan
        from ..training.rollout import BudgetRange
        from ..training.tower_pipeline import train_tower as run

        plan = TrainingPlan(
            output=output,
            warmup_steps=warmup_steps,
            steps=steps,
            budgets=BudgetRange(*low_high),
            seed=seed,
            save_every=save_steps,
            scorer={"width": width},
            warmup_args={
                **shared,
                "per_device_train_batch_size": warmup_batch_size,
                "learning_rate": warmup_learning_rate,
            },
            args={
                **shared,
                "per_device_train_batch_size": batch_size,
                "num_generations": num_generations,
                "learning_rate": learning_rate,
                "entropy_coef": 0.001,
            },
            keep_ratio=keep_ratio,
            data={**choice.facts(), "examples": examples, "scorer": scorer},
        )
        plan.stages()  # upstream refuses what it does not like before anything is loaded
        check_folder(output)
        loaded, processor = choice.load()
        folder = scorer or attached_folder(loaded)
        if folder is None:
            raise ScorerError("no scorer came with the model: give one by --scorer, as `grip-hf train` makes it")
        teacher = GripScorer.from_pretrained(folder)
        if dataset is None:
            rows: Any = PocketExamples(examples, seed, testbed=testbed)
        else:
            rows = load_examples(dataset, split, examples, seed, on_bad_row, TRAIN_SPLITS).examples
        run(plan, loaded, processor, rows, teacher.to(loaded.device), tower_depth, tower_keep_ratio, say)
        say(f"scorer and tower scorer are in {output}: apply_grip(model, scorer={str(output)!r})")
