"""`grip-hf curve`: what each budget, and each promise, is worth with your model and data on this machine."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .calibrate import LADDER, Confidence, MaxNewTokens, Qualities, Unit
from .loading import goes_on
from .screen import JsonFile, budget_list, console, failures, in_folder, numbers, quiet, say
from .survey import Examples_, Scorer, Selector, Styles, Survey

if TYPE_CHECKING:
    from ..calibration.observe import Observed
    from ..calibration.timing import Times


def curve(
    context: typer.Context,
    pocket: options.Pocket = False,
    testbed: options.Testbed = options.TESTBED,
    model: options.Model = None,
    scorer: Scorer = None,
    selector: Selector = None,
    dataset: options.Dataset = None,
    split: options.Split = None,
    quality: Qualities = "0.95,0.98,0.99",
    confidence: Confidence = 0.95,
    unit: Unit = "answer",
    within: Annotated[float, typer.Option(min=0, help="Tell the smallest budget within so many points.")] = 1.0,
    budgets: options.Budgets = LADDER,
    examples: Examples_ = 1000,
    max_new_tokens: MaxNewTokens = 32,
    metric: options.Metric = "exact",
    rounds: Annotated[int, typer.Option(min=1, help="Paired rounds of timing; medians are taken over them.")] = 5,
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
    output: Annotated[Path | None, typer.Option(callback=in_folder, help="Where to write the picture.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Print agreement and accuracy against mean visual tokens and measured time, fixed budgets beside promises."""
    survey, asked = Survey.of(context), budget_list(budgets)
    wanted = numbers(quality, float, "shares such as 0.99")
    quiet()
    from ..calibration.calibrate import agreement_of
    from ..calibration.overview import draw, overview, smallest
    from ..config import check_quality
    from ..evaluation.facts import versions
    from ..files import write_json, write_whole

    with failures():
        agreement_of(unit)
        for one in wanted:
            check_quality(one)
        seen, made_for, facts = survey.observe(asked, batch_size, max_new_tokens, metric, cpu_time)
        if not goes_on():
            return
        with console.status("timing") as status:
            times, setting = measure(survey, seen, rounds, status.update, cpu_time)
        rows = overview(seen, times, wanted, confidence, unit, seed)
        console.print(table(rows, len(seen), unit).rich())
        best, name = smallest(rows, within)
        say(f"smallest budget within {within:g} points of all tokens ({name}): {best['name']}")
        if output is not None:
            figure = draw(rows, f"{survey.choice.name}, {len(seen)} questions")
            write_whole(output, partial(figure.savefig, dpi=150))
            say(f"drawn in {output}")
        if json_file is not None:
            meta = {**facts, "made_for": made_for, "rows": len(seen), "unit": unit, "confidence": confidence}
            meta |= {"seed": seed, "timing": setting, "versions": versions()}
            told = {"within": within, "of": name, "budget": best["budget"]}
            write_json(json_file, {"meta": meta, "rows": rows, "smallest": told})


def measure(
    survey: Survey, seen: Observed, rounds: int, progress: Any, cpu_time: bool
) -> tuple[Times, dict[str, Any]]:
    """Time the model on its first question at every budget that was observed, in paired rounds."""
    from ..calibration.timing import Times
    from ..engine.budget import Budget
    from ..evaluation.budgets import kept_of
    from ..evaluation.latency import run_bench
    from ..evaluation.shapes import prompted
    from ..evaluation.towers import TowerChoice
    from ..patch import remove_grip

    (model, processor), (examples, _) = survey.loaded, survey.rows
    handle = survey.chooser.apply(model)
    name, share, tower = handle.config.selector, handle.config.tower_keep_ratio, None
    drops = handle.tower.dropping(Budget(num_tokens=1, tower_keep_ratio=share))
    if drops is not None:
        tower = TowerChoice((share,), drops.selector, drops.tower.first)
    spec = f"grip={survey.scorer}" if name == "grip" and survey.scorer else str(name)
    remove_grip(model)
    asked, fewer = prompted(survey.choice.name, model, processor, examples[0].messages), seen.budgets[:-1]
    result = run_bench(asked, [spec], fewer, rounds, 4, progress=progress, tower=tower, cpu_time=cpu_time)
    wanted = None if tower is None else share
    found = {row["num_tokens"]: row for row in result["rows"] if row["tower_keep_ratio"] == wanted}
    rows = [*(found[kept_of(asked.tokens, one)] for one in fewer), result["unpruned"]]
    # The picture is the same at every budget, and what is measured once is measured alike.
    vision = [(row if tower is not None else result["unpruned"])["vision_ms"] for row in rows]
    encodings = None if seen.encodings is None else seen.encodings.tolist()
    times = Times([row["ttft_ms"] for row in rows], vision, [row["decode_ms"] for row in rows], encodings)
    return times, result["setting"]


def table(rows: list[dict[str, Any]], count: int, unit: str) -> Any:
    """The rows of an overview."""
    from ..tables import Column, Table

    columns = (
        Column("", "name", left=True),
        Column("judged by", "rule", left=True),
        Column("tokens", "tokens", "{:.1f}"),
        Column("again", "again", "{:.1%}"),
        Column("agreement", "agreement", "{:.2%}"),
        Column("at least", "at_least", "{:.2%}"),
        Column("accuracy", "accuracy", "{:.2%}"),
        Column("TTFT ms", "ttft_ms", "{:.1f}"),
    )
    return Table(columns, rows, f"{count} questions; unit: {unit}; means")
