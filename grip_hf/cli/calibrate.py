"""`grip-hf calibrate`: find out on your own data what can be promised of a model's answers, and at which budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .loading import ModelChoice
from .screen import JsonFile, budget_list, console, failures, numbers, quiet, say, split_list
from .subject import Examples_, Scorer, Selector, Styles, Subject

Qualities = Annotated[str, typer.Option(help="Shares of answers to be as with all tokens, separated by commas.")]
Confidence = Annotated[float, typer.Option(help="How sure each promise is to be.")]
Unit = Annotated[str, typer.Option(help="What agreement is counted in: answer (the whole), or token.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer; as in your own calls of generate.")]
LADDER = "0.03,0.05,0.07,0.11,0.18,0.25,0.5"


def calibrate(
    pocket: options.Pocket = False,
    testbed: options.Testbed = "pocket",
    model: options.Model = None,
    scorer: Scorer = None,
    selector: Selector = None,
    dataset: options.Dataset = None,
    split: options.Split = None,
    quality: Qualities = "0.99",
    confidence: Confidence = 0.95,
    rule: Annotated[
        str,
        typer.Option(help="When an answer is doubted: by all of it (answer), by its first token (first), or both."),
    ] = "answer,first",
    unit: Unit = "answer",
    budgets: options.Budgets = LADDER,
    examples: Examples_ = 2000,
    max_new_tokens: MaxNewTokens = 32,
    metric: options.Metric = "exact",
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 16,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    device_map: options.DeviceMap = None,
    attn_implementation: options.Attention = None,
    on_bad_row: options.OnBadRow = "stop",
    force: options.Force = False,
    pocket_model: options.PocketModel = None,
    styles: Styles = "fluent,google",
    output: Annotated[Path | None, typer.Option(help="Folder to write to; without it, that of the scorer.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Promise a quality: ask a model with all tokens and with few, and find the cheapest ladder that keeps it.

    Data without answers is enough. `generate` then answers at few tokens first, and again at more where it is in
    doubt: apply_grip(model, scorer=FOLDER, quality=0.99).
    """
    choice = ModelChoice(
        pocket, pocket_model, model, dataset, device, dtype, quantize, device_map, attn_implementation, testbed
    )
    wanted, rules = numbers(quality, float, "shares such as 0.99"), split_list(rule)
    subject = Subject(choice, scorer, selector, force, split, examples, seed, on_bad_row, tuple(split_list(styles)))
    asked = budget_list(budgets)
    quiet()
    from accelerate import PartialState

    from ..calibration.calibrate import agreement_of, check_rows
    from ..calibration.calibrate import calibrate as run
    from ..config import check_quality
    from ..files import check_folder, write_json
    from .folder import place_of, save

    with failures():
        place = check_folder(place_of(output, scorer))
        agreement_of(unit)
        for one in wanted:
            check_rows(examples, check_quality(one), confidence)
        seen, made_for, facts = subject.observe(asked, batch_size, max_new_tokens, metric)
        processes = PartialState()
        if processes.num_processes > 1:
            processes.destroy_process_group()
            if not processes.is_main_process:
                return
        found = run(seen, made_for, wanted, confidence, rules, unit, max_new_tokens, seed, facts)
        save(subject, found, place)
        console.print(promises(found).rich())
        console.print(budgets_table(found).rich())
        if json_file is not None:
            import dataclasses

            write_json(json_file, dataclasses.asdict(found))
        say(f"the calibration is in {place}: apply_grip(model, scorer={str(place)!r}, quality={wanted[-1]:g})")


def promises(found: Any) -> Any:
    """The promises of a calibration as a table."""
    from ..evaluation.budgets import label
    from ..tables import Column, Table

    rows = [
        {
            **vars(one),
            "ladder": " > ".join(map(label, one.ladder)),
            "thresholds": ", ".join(f"{limit:.3f}" for limit in one.thresholds) or None,
        }
        for one in found.promises
    ]
    columns = (
        Column("promise", "quality", "{:.1%}"),
        Column("rule", "rule", left=True),
        Column("ladder", "ladder", left=True),
        Column("again below", "thresholds", left=True),
        Column("mean tokens", "tokens", "{:.1f}"),
        Column("looked again", "again", "{:.1%}"),
        Column("agreement", "agreement", "{:.2%}"),
    )
    first = found.promises[0]
    title = f"promised with {first.confidence:.0%} confidence each; seen on the {first.rows} rows that tested them"
    return Table(columns, rows, title)


def budgets_table(found: Any) -> Any:
    """The curve of a calibration as a table."""
    from ..evaluation.budgets import label
    from ..tables import Column, Table

    columns = (
        Column("one budget for all", "budget", label),
        Column("mean tokens", "tokens", "{:.1f}"),
        Column("agreement", "agreement", "{:.2%}"),
        Column("at least", "at_least", "{:.2%}"),
        Column("accuracy", "accuracy", "{:.2%}"),
        Column("ms per answer", "ms", "{:.1f}"),
    )
    return Table(columns, list(found.curve), f"{found.data['rows']} rows, unit: {found.unit}")
