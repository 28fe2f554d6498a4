"""`grip-hf train`: a scorer for the pocket model, or for a model and dataset of your own."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .loading import ModelChoice
from .screen import failures, numbers, quiet, split_list

# Options of TRL's or transformers' that have a name of their own here, or that the stages rely on.
TAKEN = ("output_dir", "max_steps", "seed", "save_steps", "save_total_limit", "report_to", "use_cpu")


def train_command(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Folder of the run; going on with an unfinished one is automatic.")],
    pocket: options.Pocket = False,
    model: options.Model = None,
    dataset: options.Dataset = None,
    split: options.Split = None,
    method: Annotated[str, typer.Option(help="After the warm-up: grpo, relaxed, or warmup for nothing.")] = "grpo",
    scorer: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub id of a scorer to go on from, or grip for the model's own; without a warm-up then."
        ),
    ] = None,
    warmup_steps: Annotated[
        int | None, typer.Option(min=0, help="Steps of the warm-up.", show_default="400, with --scorer 0")
    ] = None,
    steps: Annotated[int, typer.Option(min=0, help="Steps of the method.")] = 900,
    warmup_batch_size: Annotated[int, typer.Option(min=1, help="Examples per warm-up step and process.")] = 32,
    batch_size: Annotated[int, typer.Option(min=1, help="Keep-sets per GRPO step and process.")] = 64,
    num_generations: Annotated[
        int, typer.Option(min=2, help="Keep-sets per example; the relaxation takes batch / generations examples too.")
    ] = 8,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of the method.")] = 3e-4,
    warmup_learning_rate: Annotated[float, typer.Option(help="Peak learning rate of the warm-up.")] = 1e-3,
    budgets: Annotated[str, typer.Option(help="Smallest and largest keep ratio, separated by a comma.")] = "0.03,0.6",
    target: Annotated[str, typer.Option(help="Target of the warm-up: combined, gradient or attention.")] = "combined",
    share_weight: Annotated[
        float, typer.Option(help="Weight of the warm-up's second loss: scores that follow the importance.")
    ] = 1.0,
    rewards: Annotated[
        str, typer.Option(help="Rewards: closeness, correctness, likelihood, ladder.")
    ] = "closeness,correctness",
    reward_weights: Annotated[str, typer.Option(help="Their weights.")] = "1,1",
    entropy_coef: Annotated[float, typer.Option(help="Weight of the entropy bonus.")] = 0.001,
    beta: Annotated[float, typer.Option(help="Weight of the KL to the warm-up's policy.")] = 0.0,
    greedy: Annotated[bool, typer.Option(help="Give each group a greedy member as part of its baseline.")] = False,
    temperature: Annotated[float, typer.Option(help="Temperature of GRPO's draws, or of the soft top-k.")] = 1.0,
    final_temperature: Annotated[
        float | None, typer.Option(help="What the soft top-k's temperature ends at; else it stays.")
    ] = None,
    soft_gates: Annotated[bool, typer.Option(help="Let the relaxation see soft choices, not hard ones.")] = False,
    draws: Annotated[int, typer.Option(min=1, help="Keep-sets per example and step of the relaxation.")] = 1,
    width: Annotated[int | None, typer.Option(min=1, help="Width of the scorer.", show_default="256")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers of the scorer.", show_default="2")] = None,
    memory_width: Annotated[
        int, typer.Option(min=0, help="Numbers by which kept tokens change the scores of the rest.")
    ] = 0,
    examples: Annotated[int, typer.Option(min=1, help="Questions to train on (of a dataset: at most).")] = 30_000,
    on_bad_row: options.OnBadRow = "stop",
    streaming: options.Streaming = False,
    pictures: options.Pictures = None,
    seed: options.Seed = 0,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 250,
    keep_ratio: Annotated[float, typer.Option(help="Budget that the scorer is saved with.")] = 0.25,
    report_to: Annotated[str, typer.Option(help="Where metrics go: none, tensorboard, wandb, trackio, ...")] = "none",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    device_map: options.DeviceMap = None,
    attn_implementation: options.Attention = None,
    cpu: Annotated[bool, typer.Option("--cpu", hidden=True)] = False,
    eval_examples: Annotated[int, typer.Option(min=0, help="Held-out questions for eval_table.json.")] = 450,
    metric: options.Metric = "exact",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure a few steps and estimate the rest.")] = False,
    pocket_model: options.PocketModel = None,
    testbed: options.Testbed = options.TESTBED,
) -> None:
    """Train a scorer: supervised warm-up, then GRPO on TRL's trainer (or the relaxation that it is compared with).

    Any other option of TRL's GRPOConfig (of transformers' TrainingArguments, for the relaxation) is taken too, such
    as --gradient_accumulation_steps 4. Columns of a dataset: images and messages, prompt and answer, and more.
    """
    device = "cpu" if cpu else device
    if device not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(f"--device must be auto, cpu or cuda here (CUDA_VISIBLE_DEVICES=N), got {device!r}")
    choice = ModelChoice.of(context, device=device)
    quiet()
    low_high = _numbers(budgets, 2, "--budgets")
    names = split_list(rewards)
    shared: dict[str, Any] = {"report_to": report_to, "use_cpu": device == "cpu"}
    if not sys.stderr.isatty():
        shared["disable_tqdm"] = True  # a log gets one line per logging step
    args: dict[str, Any] = {**shared, "per_device_train_batch_size": batch_size, "learning_rate": learning_rate}
    if method == "grpo":
        weights = _numbers(reward_weights, len(names), "--reward-weights")
        args |= {"num_generations": num_generations, "reward_weights": weights, "entropy_coef": entropy_coef}
        args |= {"beta": beta, "temperature": temperature}
        more: dict[str, Any] = {"rewards": names, "greedy": greedy}
    else:
        args["per_device_train_batch_size"] = max(1, batch_size // num_generations)
        more = {"temperature": temperature, "draws": draws}
        more |= {"final_temperature": final_temperature} if final_temperature is not None else {}
        more |= {"soft_gates": True} if soft_gates else {}
    args |= upstream_options(context.args, method)
    with failures():
        from ..evaluation.answers import check_metric
        from ..files import check_folder
        from ..training.plan import TrainingPlan
        from ..training.rollout import BudgetRange
        from .job import Job, estimate

        rows = {"dataset": dataset, "split": split, "held_out": eval_examples} if dataset else {}
        rows |= {"streaming": True} if streaming else {}
        check_metric(metric)
        plan = TrainingPlan(
            output=output,
            method=method,
            warmup_steps=(0 if scorer else 400) if warmup_steps is None else warmup_steps,
            steps=steps,
            budgets=BudgetRange(*low_high),
            target=target,
            share_weight=share_weight,
            seed=seed,
            save_every=save_steps,
            scorer=_sizes(width, layers, memory_width, {} if scorer else {"width": 256, "num_layers": 2}),
            start=scorer,
            warmup_args={
                **shared,
                "per_device_train_batch_size": warmup_batch_size,
                "learning_rate": warmup_learning_rate,
            },
            args=args,
            options=more,
            keep_ratio=keep_ratio,
            data={**choice.facts(), "examples": examples, **rows},
        )
        plan.stages()  # upstream refuses what it does not like before anything is loaded
        if not dry_run:
            check_folder(output)
        job = Job(choice, plan, split, on_bad_row, metric, eval_examples, streaming, pictures)
        if dry_run:
            estimate(job)
            return
        job.run()


def _sizes(width: int | None, layers: int | None, memory_width: int, usual: dict[str, int]) -> dict[str, int]:
    """The sizes of a scorer that were asked for, and the usual ones of a fresh one."""
    given = {"width": width, "num_layers": layers, "memory_width": memory_width or None}
    return usual | {name: size for name, size in given.items() if size is not None}


def upstream_options(words: list[str], method: str) -> dict[str, Any]:
    """What further options set in TRL's `GRPOConfig`, or in transformers' `TrainingArguments`.

    TRL's own parser reads them. It does not read the options above, because it would show all of its own 200 in the
    help and would set each of them, also those that were not given.
    """
    if not words:
        return {}
    from argparse import SUPPRESS

    from transformers import TrainingArguments
    from trl import GRPOConfig, TrlParser

    known: Any = GRPOConfig if method == "grpo" else TrainingArguments
    parser = TrlParser((known,))
    for action in parser._actions:
        action.default, action.required = SUPPRESS, False

    def refuse(message: str) -> None:
        raise typer.BadParameter(f"{message} (options of this command, and of {known.__name__}, are known)")

    parser.error = refuse  # type: ignore[method-assign,assignment]
    found = vars(parser.parse_args(words))
    fields = {field.name for field in dataclasses.fields(known)}
    if taken := sorted(set(found) & set(TAKEN)):
        raise typer.BadParameter(f"{', '.join(f'--{name}' for name in taken)}: this command sets it; see --help")
    return {name: value for name, value in found.items() if name in fields}


def _numbers(text: str, count: int, option: str) -> list[float]:
    values = numbers(text, wanted=f"{option}: numbers")
    if len(values) != count:
        raise typer.BadParameter(f"{option} needs {count} numbers separated by commas, got {text!r}")
    return values
