"""`grip-hf calibrate`: find out on your own data what can be promised of a model's answers, and at which budgets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .loading import goes_on
from .screen import JsonFile, budget_list, console, failures, numbers, quiet, say, split_list
from .survey import Examples_, Scorer, Selector, Styles, Survey

Qualities = Annotated[str, typer.Option(help="Shares of answers to be as with all tokens, separated by commas.")]
Confidence = Annotated[float, typer.Option(help="How sure each promise is to be.")]
Unit = Annotated[str, typer.Option(help="What agreement is counted in: answer (the whole), or token.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer; as in your own calls of generate.")]
LADDER = "0.03,0.05,0.07,0.11,0.18,0.25,0.5"


def calibrate(
    context: typer.Context,
    pocket: options.Pocket = False,
    testbed: options.Testbed = options.TESTBED,
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
    tower_keep_ratio: options.TowerShare = None,
    tower_selector: options.TowerSelector = None,
    tower_depth: options.TowerDepth = None,
    pocket_model: options.PocketModel = None,
    styles: Styles = "fluent,google",
    cpu_time: options.CpuTime = False,
    output: Annotated[Path | None, typer.Option(help="Folder to write to; without it, that of the scorer.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Promise a quality: ask a model with all tokens and with few, and find the cheapest ladder that keeps it.

    Data without answers is enough. `generate` then answers at few tokens first, and again at more where it is in
    doubt: apply_grip(model, scorer=FOLDER, quality=0.99).
    """
    survey, asked = Survey.of(context), budget_list(budgets)
    wanted, rules = numbers(quality, float, "shares such as 0.99"), split_list(rule)
    quiet()
    from ..calibration.calibrate import calibrate as run
    from ..calibration.calibrate import check_asked
    from ..files import check_folder, write_json
    from ..quality.shown import curve, promises
    from .folder import place_of, save

    with failures():
        place = check_folder(place_of(output, scorer))
        check_asked(examples, wanted, confidence, rules, unit)
        seen, made_for, facts = survey.observe(asked, batch_size, max_new_tokens, metric, cpu_time)
        if not goes_on():
            return
        found = run(seen, made_for, wanted, confidence, rules, unit, max_new_tokens, seed, facts)
        save(survey, found, place)
        console.print(promises(found).rich())
        console.print(curve(found).rich())
        if json_file is not None:
            write_json(json_file, dataclasses.asdict(found))
        say(f"the calibration is in {place}: apply_grip(model, scorer={str(place)!r}, quality={wanted[-1]:g})")
