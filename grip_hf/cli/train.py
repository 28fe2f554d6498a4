"""`grip-hf train`: a scorer for the pocket model, or for a model and dataset of your own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

console = Console()


def train(
    output: Annotated[Path, typer.Option(help="Folder of the run; going on with an unfinished one is automatic.")],
    pocket: Annotated[bool, typer.Option("--pocket", help="Train for the pocket model on its scenes.")] = False,
    model: Annotated[str | None, typer.Option(help="Or: id or folder of a model.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="With --model: id or folder of a dataset with image(s), prompt, perhaps answer.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of that dataset.")] = "train",
    method: Annotated[str, typer.Option(help="After the warm-up: grpo, relaxed, or warmup for nothing.")] = "grpo",
    warmup_steps: Annotated[int, typer.Option(min=0, help="Steps of the warm-up.")] = 400,
    steps: Annotated[int, typer.Option(min=0, help="Steps of the method.")] = 900,
    warmup_batch: Annotated[int, typer.Option(min=1, help="Examples per warm-up step and process.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Keep-sets per GRPO step and process.")] = 64,
    generations: Annotated[
        int, typer.Option(min=2, help="Keep-sets per example; the relaxation takes batch / generations examples too.")
    ] = 8,
    rate: Annotated[float, typer.Option(help="Peak learning rate of the method.")] = 3e-4,
    warmup_rate: Annotated[float, typer.Option(help="Peak learning rate of the warm-up.")] = 1e-3,
    budgets: Annotated[str, typer.Option(help="Smallest and largest keep ratio, separated by a comma.")] = "0.03,0.6",
    target: Annotated[str, typer.Option(help="Target of the warm-up: combined, gradient or attention.")] = "combined",
    rewards: Annotated[
        str, typer.Option(help="Rewards: closeness, correctness, likelihood.")
    ] = "closeness,correctness",
    reward_weights: Annotated[str, typer.Option(help="Their weights.")] = "1,1",
    entropy: Annotated[float, typer.Option(help="Weight of the entropy bonus.")] = 0.001,
    beta: Annotated[float, typer.Option(help="Weight of the KL to the warm-up's policy.")] = 0.0,
    greedy: Annotated[bool, typer.Option(help="Give each group a greedy member as part of its baseline.")] = False,
    temperature: Annotated[float, typer.Option(help="Temperature of GRPO's draws, or of the soft top-k.")] = 1.0,
    draws: Annotated[int, typer.Option(min=1, help="Keep-sets per example and step of the relaxation.")] = 1,
    width: Annotated[int, typer.Option(min=1, help="Width of the scorer.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the scorer.")] = 1,
    rows: Annotated[int, typer.Option(min=1, help="Questions to train on (of a dataset: at most).")] = 30_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, order and draws.")] = 0,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 250,
    report_to: Annotated[str, typer.Option(help="Where metrics go: none, tensorboard, wandb, trackio, ...")] = "none",
    quantize: Annotated[str | None, typer.Option(help="Load the model in 4bit or 8bit.")] = None,
    device_map: Annotated[str | None, typer.Option(help="Device map of the model.")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Stay on the CPU.")] = False,
    eval_examples: Annotated[int, typer.Option(min=0, help="Held-out questions for eval_table.json.")] = 450,
    pocket_model: Annotated[Path | None, typer.Option(help="Folder of another pocket model.")] = None,
) -> None:
    """Train a scorer: supervised warm-up, then GRPO on TRL's trainer (or the relaxation that it is compared with)."""
    from ..errors import GripError

    if pocket == (model is not None) or (model is None) != (dataset is None):
        raise typer.BadParameter("give either --pocket, or --model and --dataset")
    if pocket and (quantize or device_map):
        raise typer.BadParameter("--quantize and --device-map go with --model, not with --pocket")
    low_high = _numbers(budgets, 2, "--budgets")
    names = [name.strip() for name in rewards.split(",") if name.strip()]
    shared: dict[str, Any] = {"report_to": report_to, "use_cpu": cpu}
    args: dict[str, Any] = {**shared, "per_device_train_batch_size": batch, "learning_rate": rate}
    if method == "grpo":
        weights = _numbers(reward_weights, len(names), "--reward-weights")
        args |= {"num_generations": generations, "reward_weights": weights, "entropy_coef": entropy, "beta": beta}
        args["temperature"] = temperature
        options: dict[str, Any] = {"rewards": names, "greedy": greedy}
    else:
        args["per_device_train_batch_size"] = max(1, batch // generations)
        options = {"temperature": temperature, "draws": draws}
    try:
        from ..frozen.store import SampleStore
        from ..training.pipeline import TrainingPlan
        from ..training.pipeline import train_scorer as run
        from ..training.rollout import BudgetRange

        plan = TrainingPlan(
            output=output,
            method=method,
            warmup_steps=warmup_steps,
            steps=steps,
            budgets=BudgetRange(*low_high),
            target=target,
            seed=seed,
            save_every=save_every,
            scorer={"width": width, "num_layers": layers},
            warmup_args={**shared, "per_device_train_batch_size": warmup_batch, "learning_rate": warmup_rate},
            args=args,
            options=options,
        )
        vlm, examples, held_out = _load(
            pocket, pocket_model, model, dataset, split, rows, seed, eval_examples, quantize, device_map
        )
        run(plan, SampleStore(vlm, examples))
        vlm.close()
        if held_out is not None:
            _table(plan, vlm, held_out, seed, pocket)
    except GripError as error:
        raise typer.BadParameter(str(error)) from error
    console.print(f"the scorer is in {output}")


def _numbers(text: str, count: int, option: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) != count:
        raise typer.BadParameter(f"{option} needs {count} numbers separated by commas, got {text!r}")
    return values


def _load(
    pocket: bool,
    pocket_model: Path | None,
    model: str | None,
    dataset: str | None,
    split: str,
    rows: int,
    seed: int,
    eval_examples: int,
    quantize: str | None,
    device_map: str | None,
) -> tuple[Any, Any, Any]:
    """The frozen model, the examples to train on, and those to evaluate on (or None)."""
    from ..frozen.data import DatasetError, DatasetExamples
    from ..frozen.sources import load_model, load_rows
    from ..frozen.vlm import FrozenVLM
    from ..pocket.examples import PocketExamples, load_pocket

    if pocket:
        held_out = PocketExamples(eval_examples, seed, "test") if eval_examples else None
        return FrozenVLM(*load_pocket(pocket_model)), PocketExamples(rows, seed), held_out
    assert model is not None and dataset is not None
    examples = load_rows(dataset, split, rows + eval_examples)
    if not eval_examples:
        return FrozenVLM(*load_model(model, quantize, device_map)), examples, None
    if len(examples) <= eval_examples:
        raise DatasetError(f"the dataset has {len(examples)} rows, too few to hold out {eval_examples}")
    cut = len(examples) - eval_examples
    train_rows = DatasetExamples(examples.dataset.select(range(cut)))
    held_out_rows = DatasetExamples(examples.dataset.select(range(cut, len(examples))))
    return FrozenVLM(*load_model(model, quantize, device_map)), train_rows, held_out_rows


def _table(plan: Any, vlm: Any, held_out: Any, seed: int, pocket: bool) -> None:
    """Evaluate each stage's scorer and write `eval_table.json`; only the first process does."""
    from accelerate import PartialState

    from ..evaluation.runner import evaluate
    from ..evaluation.tasks import named_selectors
    from .eval import show, write_table

    if not PartialState().is_main_process:
        return
    stages = [name for name in ("warmup", plan.method) if (plan.output / name / "scorer").is_dir()]
    specs = [f"{name}={plan.output / name / 'scorer'}" for name in dict.fromkeys(stages)]
    known = ["oracle"] if pocket else []
    selectors = named_selectors([*specs, "random", "grid", "similarity", *known], seed, pocket)
    rows = evaluate(vlm.model, vlm.processor, held_out, selectors, (0.5, 0.25, 0.11, 0.05, 0.03))
    show(rows)
    write_table(plan.output / "eval_table.json", rows, {"examples": len(held_out), "seed": seed, "steps": plan.steps})
