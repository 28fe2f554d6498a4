"""`grip-hf eval`: how accurate a model stays under every selector and budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .loading import ModelChoice, goes_on, load_examples
from .screen import JsonFile, budget_list, failures, in_folder, quiet, say, split_list, tower_choice


def eval_command(
    context: typer.Context,
    pocket: options.Pocket = False,
    testbed: options.Testbed = options.TESTBED,
    model: options.Model = None,
    dataset: options.Dataset = None,
    split: options.Split = None,
    selectors: Annotated[
        str | None,
        typer.Option(
            help="Separated by commas; label=folder takes a scorer of your own, label=folder+folder averages. Without "
            "it: the scorer that came with the model, and baselines."
        ),
    ] = None,
    budgets: options.Budgets = "0.5,0.25,0.11,0.05,0.03",
    examples: Annotated[int, typer.Option(min=1, help="Questions to ask.")] = 2000,
    metric: options.Metric = "exact",
    max_new_tokens: options.NewTokens = 32,
    calibration: Annotated[
        bool,
        typer.Option("--calibration", help="Tell the calibration error too; the logits of answers are kept."),
    ] = False,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 16,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    device_map: options.DeviceMap = None,
    attn_implementation: options.Attention = None,
    on_bad_row: options.OnBadRow = "stop",
    streaming: options.Streaming = False,
    pictures: options.Pictures = None,
    force: options.Force = False,
    tower_keep_ratio: options.TowerRatio = None,
    tower_selector: options.TowerSelector = None,
    tower_depth: options.TowerDepth = None,
    pocket_model: options.PocketModel = None,
    log_samples: Annotated[
        Path | None, typer.Option(callback=in_folder, help="Where to write every answer, a line of JSON each.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Print and write a score per task and budget, with 95 % intervals, beside the unpruned model.

    Started by `accelerate launch` or `torchrun`, its processes share the examples; the table stays the same.
    """
    choice = ModelChoice.of(context)
    asked = budget_list(budgets)
    quiet()
    from accelerate import PartialState

    from ..evaluation.facts import versions
    from ..evaluation.runner import evaluate
    from ..evaluation.tasks import choose_selectors, is_scorer, pocket_examples
    from ..frozen.sources import TEST_SPLITS, TRAIN_SPLITS

    with failures():
        loaded, processor = choice.load()
        chosen, left_out = choose_selectors(loaded, selectors and split_list(selectors), seed, pocket, force, testbed)
        facts: dict[str, Any] = {}
        scorers = [name for name, one in chosen.items() if is_scorer(one)]
        if (tower := tower_choice(tower_keep_ratio, tower_selector, tower_depth)) is not None:
            from ..evaluation.towers import with_towers

            facts["tower"] = {"keep_ratio": list(tower.ratios), "selector": tower.selector, "depth": tower.depth}
            chosen = with_towers(chosen, tower, loaded, seed)
        if pocket:
            rows: Any = pocket_examples(examples, seed, testbed)
        else:
            wanted = (*TEST_SPLITS, *TRAIN_SPLITS)
            screened = load_examples(str(dataset), split, examples, seed, on_bad_row, wanted, streaming=streaming)
            rows = screened.examples
            facts |= {"dataset": dataset, "split": split, "columns": str(rows.format), "bad_rows": len(screened.bad)}
        processes = PartialState()
        if left_out and processes.is_main_process:
            say(f"left out, since they cannot work with this model: {', '.join(left_out)}")
        found = evaluate(
            loaded, processor, rows, chosen, asked, batch_size,
            processes=processes, metric=metric, max_new_tokens=max_new_tokens,
            calibration=calibration, share=pictures,
        )  # fmt: skip
        if not goes_on():
            return
        from .report import show, write_samples, write_table

        show(found)
        meta = {**choice.facts(), **facts, "examples": len(rows), "seed": seed, "selectors": list(chosen)}
        meta |= {"scorers": scorers, "budgets": asked, "max_new_tokens": max_new_tokens, "versions": versions()}
        if json_file is not None:
            write_table(json_file, found, meta)
            say(f"written to {json_file}")
        if log_samples is not None:
            write_samples(log_samples, found)
            say(f"every answer is in {log_samples}")
