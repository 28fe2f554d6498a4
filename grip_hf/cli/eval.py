"""`grip-hf eval`: how accurate a model stays under every selector and budget."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..evaluation.metrics import MEAN, UNPRUNED, Row
from .screen import JsonFile, console, numbers, split_list


def evaluate(
    pocket: Annotated[bool, typer.Option("--pocket", help="Evaluate the pocket model on held-out scenes.")] = False,
    testbed: Annotated[str, typer.Option(help='With --pocket: which one, "pocket" or "pocket2".')] = "pocket",
    model: Annotated[str | None, typer.Option(help="Or: id or folder of a model.")] = None,
    dataset: Annotated[str | None, typer.Option(help="With --model: id or folder of a dataset with answers.")] = None,
    split: Annotated[str, typer.Option(help="Split of that dataset.")] = "test",
    selectors: Annotated[
        str,
        typer.Option(
            help="Separated by commas; label=folder takes a scorer of your own, label=folder+folder averages."
        ),
    ] = "random,grid,cls_attention,similarity,diversity",
    budgets: Annotated[str, typer.Option(help="Keep ratios separated by commas.")] = "0.5,0.25,0.11,0.05,0.03",
    examples: Annotated[int, typer.Option(min=1, help="Questions to ask.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Which held-out scenes; any number draws fresh ones.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at once.")] = 64,
    pocket_model: Annotated[
        Path | None, typer.Option(help="Folder of another pocket model than the shipped one.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Print and write accuracy per task and budget, with 95 % intervals, beside the unpruned model.

    Started by `accelerate launch` or `torchrun`, its processes share the examples; the table stays the same.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    from ..errors import GripError
    from ..evaluation.runner import evaluate as run
    from ..evaluation.tasks import is_scorer, named_selectors, pocket_examples
    from ..frozen.sources import load_model, load_rows
    from ..pocket.examples import load_pocket

    if pocket == (model is not None) or (model is None) != (dataset is None):
        raise typer.BadParameter("give either --pocket, or --model and --dataset")
    try:
        chosen = named_selectors(split_list(selectors), seed, pocket, testbed)
        ratios = numbers(budgets)
        if pocket:
            vlm, processor = load_pocket(pocket_model, testbed)
            rows: Any = pocket_examples(examples, seed, testbed)
        else:
            assert model is not None and dataset is not None
            vlm, processor = load_model(model)
            rows = load_rows(dataset, split, examples)
        processes = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
        result = run(vlm.to(processes.device), processor, rows, chosen, ratios, batch_size, processes=processes)
    except GripError as error:
        raise typer.BadParameter(str(error)) from error
    if processes.num_processes > 1:
        processes.destroy_process_group()
        if not processes.is_main_process:
            return
    show(result)
    if json_file is not None:
        meta = {"model": testbed if pocket else model, "examples": len(rows), "seed": seed, "selectors": list(chosen)}
        meta["scorers"] = [name for name, one in chosen.items() if is_scorer(one)]
        write_table(json_file, result, meta)
        console.print(f"written to {json_file}")


def show(rows: Sequence[Row]) -> None:
    """Print the means over tasks, selectors by budgets, and the unpruned model's accuracy on each task."""
    means = {(row["selector"], row["budget"]): row for row in rows if row["task"] == MEAN}
    names = dict.fromkeys(name for name, _ in means if name != UNPRUNED)
    budgets = dict.fromkeys(budget for name, budget in means if name != UNPRUNED)
    full = {row["task"]: f"{row['task']} {100 * row['accuracy']:.1f}" for row in rows if row["selector"] == UNPRUNED}
    console.print("unpruned: " + ", ".join(full.values()))
    grid = Table(title="right answers in %, mean over tasks, with half its 95 % interval")
    grid.add_column("selector")
    for budget in budgets:
        grid.add_column(f"keep {budget:.0%}", justify="right")
    for name in names:
        line = [means[name, budget] for budget in budgets]
        halves = [(row["ci95"][1] - row["ci95"][0]) / 2 for row in line]
        cells = [f"{100 * row['accuracy']:.1f} ± {100 * half:.1f}" for row, half in zip(line, halves, strict=True)]
        grid.add_row(name, *cells)
    console.print(grid)


def write_table(path: Path, rows: Sequence[Row], meta: dict[str, Any]) -> None:
    """Write `{"meta": ..., "rows": [...]}` as JSON, in one go."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps({"meta": meta, "rows": list(rows)}, indent=1) + "\n")
    os.replace(fresh, path)
