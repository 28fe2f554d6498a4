"""Do promises hold? Calibrate on some scenes and look at others, again and again, on the pocket model.

    python -m grip_hf.calibration.draws answer --examples 2000 --seed 900 --output answers.npz
    python -m grip_hf.calibration.draws table answers.npz --rows 1200 --fresh 800 --latency small.json

Answering takes long and is done once; draws of calibration and fresh scenes from what was answered cost nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ..evaluation.budgets import Budget, kept_of
from ..files import check_writable, write_json
from ..pocket.testbeds import DEFAULT
from ..tables import Column, Table
from .bound import binomial, rows_needed
from .calibrate import SHARE, answered, best_fixed, same_answer
from .chooser import Chooser
from .features import Features
from .ladder import Answered, Policy, certify, draw_up, outcome
from .observe import FIELDS, Array, Observed, joined_tower, observe
from .timing import Times, first_token

app = typer.Typer(help=__doc__)
QUALITIES = "0.95,0.97,0.98,0.99,0.995"
BUDGETS = "0.02,0.035,0.05,0.07,0.11,0.25,0.5"
Confidence = Annotated[float, typer.Option(help="How sure each promise is to be.")]


@app.command()
def answer(
    output: Annotated[Path, typer.Option(help="File to write.")],
    examples: Annotated[int, typer.Option(min=1, help="Questions, each about a scene of its own.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Which scenes; seeds share none.")] = 900,
    styles: Annotated[str, typer.Option(help="Art styles.")] = "fluent,google",
    budgets: Annotated[str, typer.Option(help="Keep ratios.")] = BUDGETS,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at once.")] = 50,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 16,
    scorer: Annotated[str | None, typer.Option(help="Folder of a scorer; without it, the one that ships.")] = None,
    features: Annotated[bool, typer.Option("--features", help="Keep what else may tell doubt (see `head`).")] = False,
    testbed: Annotated[str, typer.Option(help='Whose model and scenes: "pocket2" or "pocket".')] = DEFAULT.name,
) -> None:
    """Ask the pocket model about fresh scenes at every budget."""
    from ..pocket.examples import OnePerScene, load_pocket_model

    check_writable(output)
    model, processor = load_pocket_model(testbed=testbed)
    rows = OnePerScene(examples, seed, testbed, styles=tuple(styles.split(",")))
    ratios = [float(one) for one in budgets.split(",")]
    chooser = Chooser(scorer)
    observe(model, processor, rows, chooser, ratios, batch_size, max_new_tokens, features=features).save(output)


@app.command()
def table(
    files: Annotated[list[Path], typer.Argument(help="What was answered.")],
    rows: Annotated[int, typer.Option(min=3, help="Scenes to calibrate on.")] = 2000,
    fresh: Annotated[int, typer.Option(min=0, help="Other scenes to look at; 0: all others.")] = 2000,
    draws: Annotated[int, typer.Option(min=1, help="How often.")] = 20,
    qualities: Annotated[str, typer.Option(help="What to promise.")] = QUALITIES,
    confidence: Confidence = 0.95,
    rule: Annotated[str, typer.Option(help="What an answer is judged by.")] = "answer",
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    latency: Annotated[Path | None, typer.Option(help="File of `grip-hf bench --json`: what budgets cost.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write every draw.")] = None,
) -> None:
    """Draw scenes to calibrate on and fresh ones, and tell how often a promise was broken, and what it took."""
    if json_file is not None:
        check_writable(json_file)
    seen = joined([Observed.load(file) for file in files])
    times = None if latency is None else times_of(json.loads(latency.read_text(encoding="utf-8")), seen.budgets)
    if times is not None:
        seen = dataclasses.replace(seen, seconds=np.array(times.ttft) - times.vision)
    if rows + max(fresh, 1) > len(seen):
        raise typer.BadParameter(f"--rows {rows} and --fresh {fresh} are more than the {len(seen)} scenes answered")
    used = rows + fresh  # by each draw, apart from the others if there are enough
    apart = draws * used <= len(seen)
    found = []
    rng = np.random.default_rng(seed)
    whole = rng.permutation(len(seen))
    for number in range(draws):
        order = np.roll(whole, -number * used) if apart else rng.permutation(len(seen))
        order = order[: used if fresh else None]
        wanted = [float(quality) for quality in qualities.split(",")]
        found += [{"draw": number, **row} for row in one_draw(seen, order, rows, wanted, confidence, rule, times)]
    looked = fresh or len(seen) - rows
    alone = "no scene in two draws" if fresh else "no scene in two calibrations"
    how = alone if apart else f"drawn anew each time from {len(seen)} scenes"
    title = f"{draws} draws of {rows} scenes to calibrate on and {looked} fresh ones, {how}; rule: {rule}"
    told = Table(COLUMNS, summary(found, looked), title)
    typer.echo(told.markdown())
    if json_file is not None:
        write_json(json_file, {"title": title, "summary": list(told.rows), "draws": found})


@app.command()
def elsewhere(
    known: Annotated[Path, typer.Option(help="What was answered of scenes like those calibrated on.")],
    other: Annotated[Path, typer.Option(help="What was answered of others.")],
    rows: Annotated[int, typer.Option(min=3, help="Of the others, how many to calibrate on.")] = 300,
    draws: Annotated[int, typer.Option(min=1, help="How often.")] = 20,
    qualities: Annotated[str, typer.Option(help="What to promise.")] = "0.95,0.97,0.98,0.99",
    confidence: Confidence = 0.95,
    rule: Annotated[str, typer.Option(help="What an answer is judged by.")] = "answer",
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
) -> None:
    """A promise for some scenes, kept or not on scenes of another kind; and one that was tested on a few of those."""
    mine, theirs = answered_of(Observed.load(known), rule), answered_of(Observed.load(other), rule)
    rng, found = np.random.default_rng(seed), []
    for number in range(draws):
        order = rng.permutation(mine.losses.shape[1])
        first, rest = np.split(order, [round(SHARE * len(order))])
        path = draw_up(mine.rows(first))  # the order of tests may come from anywhere but the rows that test
        few, fresh = np.split(rng.permutation(theirs.losses.shape[1]), [rows])
        for quality in map(float, qualities.split(",")):
            row: dict[str, Any] = {"quality": quality, "draw": number}
            for name, tested in (("known", mine.rows(rest)), ("few", theirs.rows(few))):
                enough = tested.losses.shape[1] >= rows_needed(1 - quality, confidence)
                passed = certify(path, tested, 1 - quality, confidence) if enough else None
                policy = passed[0] if passed else Policy((len(mine.losses) - 1,), ())
                made = outcome(policy, theirs.rows(fresh))
                row[name] = {"agreement": 1 - float(made.losses.mean()), "tokens": float(made.tokens.mean())}
            found.append(row)
    lines = []
    for quality in dict.fromkeys(row["quality"] for row in found):
        mine_ = [row for row in found if row["quality"] == quality]
        line: dict[str, Any] = {"quality": quality}
        for name in ("known", "few"):
            line[f"{name}_agreement"] = _mean([row[name]["agreement"] for row in mine_])
            line[f"{name}_tokens"] = _mean([row[name]["tokens"] for row in mine_])
            line[f"{name}_below"] = _mean([float(row[name]["agreement"] < quality) for row in mine_])
        lines.append(line)
    columns = [Column("promised", "quality", "{:.1%}")]
    for name, told in (("known", "calibrated elsewhere"), ("few", f"tested on {rows} of them")):
        columns += [
            Column(f"{told}: agreement", f"{name}_agreement", "{:.2%}"),
            Column("tokens", f"{name}_tokens", "{:.1f}"),
            Column("draws below", f"{name}_below", "{:.0%}"),
        ]
    typer.echo(Table(columns, lines, f"{draws} draws; the other scenes: {theirs.losses.shape[1]}").markdown())


COLUMNS = (
    Column("promised", "quality", "{:.1%}"),
    Column("one budget for all: tokens", "fixed_tokens", "{:.1f}"),
    Column("TTFT ms", "fixed_ttft", "{:.0f}"),
    Column("ladder: tokens", "tokens", "{:.1f}"),
    Column("TTFT ms", "ttft", "{:.0f}"),
    Column("looked again", "again", "{:.1%}"),
    Column("agreement, fresh", "agreement", "{:.2%}"),
    Column("lowest", "lowest", "{:.2%}"),
    Column("draws below", "below"),
    Column("surely below", "broken"),
)


def answered_of(seen: Observed, rule: str) -> Answered:
    """Whole answers, as policies are tried on them."""
    return answered(seen, rule, same_answer)


def joined(parts: Sequence[Observed]) -> Observed:
    """Rows that were answered in several goes."""
    longest = max(one.answers.shape[-1] for one in parts)
    fields: dict[str, Any] = {}
    for name in FIELDS:
        arrays = [getattr(one, name) for one in parts]
        if name == "answers":
            arrays = [
                np.pad(one, ((0, 0), (0, 0), (0, longest - one.shape[-1])), constant_values=-1) for one in arrays
            ]
        fields[name] = np.concatenate(arrays, axis=0 if name == "totals" else 1)
    seconds = np.median([one.seconds for one in parts], axis=0)
    more = [one.features for one in parts if one.features is not None]
    features = None
    if len(more) == len(parts):
        answers = np.concatenate([one.answers for one in more], axis=1)
        features = Features(answers, np.concatenate([one.rows_ for one in more]))
    fields |= joined_tower([one.vision for one in parts], [one.encodings for one in parts])
    return Observed(parts[0].budgets, **fields, seconds=seconds, cut=any(one.cut for one in parts), features=features)


def times_of(result: dict[str, Any], budgets: Sequence[Budget]) -> Times:
    """What each budget takes, from a file of `grip-hf bench --json` that timed them all."""
    total, whole = result["setting"]["visual_tokens"], result["unpruned"]
    found = {row["num_tokens"]: row for row in result["rows"]}
    rows = [whole if one == 1 else found[kept_of(total, one)] for one in budgets]
    # Shares of the unpruned time are taken within a round, so that a busy machine disturbs them least.
    ttft = [whole["ttft_ms"] * row.get("ttft_ratio", 1.0) for row in rows]
    return Times(ttft, [whole["vision_ms"]] * len(ttft), [row["decode_ms"] for row in rows])


def one_draw(
    seen: Observed,
    order: Array,
    rows: int,
    qualities: Sequence[float],
    confidence: float,
    rule: str,
    times: Times | None,
) -> list[dict[str, Any]]:
    """What promises that are made on the first rows of an order are worth on the others."""
    known, fresh = answered_of(seen.rows(order[:rows]), rule), answered_of(seen.rows(order[rows:]), rule)
    first, found = round(SHARE * rows), []
    path, tested = draw_up(known.rows(np.arange(first))), known.rows(np.arange(first, rows))
    length = float((seen.answers[-1] >= 0).sum(-1).mean())
    for quality in qualities:
        passed = certify(path, tested, 1 - quality, confidence)
        policy = passed[0] if passed else Policy((len(seen.budgets) - 1,), ())
        alike = Policy((best_fixed(known, quality, confidence),), ())
        row: dict[str, Any] = {"quality": quality, "rungs": list(policy.rungs), "thresholds": list(policy.thresholds)}
        for name, one in (("", policy), ("fixed_", alike)):
            made = outcome(one, fresh)
            row[f"{name}tokens"] = float(made.tokens.mean())
            row[f"{name}agreement"] = float(1 - made.losses.mean())
            row[f"{name}again"] = float((made.looks > 1).mean())
            if times is not None:
                reached = [float((made.looks > place).mean()) for place in range(len(one.rungs))]
                row[f"{name}ttft"] = first_token(times, one.rungs, reached, length, rule)
        found.append(row)
    return found


def summary(found: Sequence[dict[str, Any]], fresh: int) -> list[dict[str, Any]]:
    """Per quality the means over the draws, and how many were below the promise."""
    lines = []
    for quality in dict.fromkeys(row["quality"] for row in found):
        mine = [row for row in found if row["quality"] == quality]
        line: dict[str, Any] = {"quality": quality}
        for name in ("tokens", "again", "agreement", "fixed_tokens", "ttft", "fixed_ttft", "fixed_agreement"):
            if name in mine[0]:
                line[name] = _mean([row[name] for row in mine])
        line["lowest"] = min(row["agreement"] for row in mine)
        below = sum(math.floor(row["agreement"] * fresh + 0.5) < quality * fresh for row in mine)
        line["below"] = f"{below} of {len(mine)}"
        # Fresh scenes are a sample too: those draws where they alone tell, at 95 %, that the promise is broken.
        errors = [round((1 - row["agreement"]) * fresh) for row in mine]
        line["broken"] = sum(1 - binomial(count - 1, fresh, 1 - quality) <= 0.05 for count in errors)
        lines.append(line)
    return lines


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    app()
