"""The command line: `grip-hf --help`."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from grip_hf.cli import options
from grip_hf.cli.bench import bench
from grip_hf.cli.calibrate import calibrate
from grip_hf.cli.compare import compare
from grip_hf.cli.curve import curve
from grip_hf.cli.doctor import doctor
from grip_hf.cli.eval import eval_command
from grip_hf.cli.pareto import pareto
from grip_hf.cli.screen import JsonFile, console, failures, in_folder, say, split_list
from grip_hf.cli.serve import serve
from grip_hf.cli.train import train_command
from grip_hf.cli.train_tower import train_tower
from grip_hf.files import write_json, write_whole
from grip_hf.tables import Column, Table, pivot
from grip_hf.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"token_normalize_func": options.normal},
)
ANSWERS = (
    *(Column(heading, key, left=True) for heading, key in (("question", "question"), ("truth", "truth"))),
    *(Column(heading, key, left=True) for heading, key in (("all tokens", "full"), ("pruned", "pruned"))),
    Column("kept", "of", left=True),
    *(Column(heading, key, "{:.0f}") for heading, key in (("ms, all", "full_ms"), ("ms, pruned", "pruned_ms"))),
)
MORE = {"allow_extra_args": True, "ignore_unknown_options": True}  # what TRL knows; it refuses the rest


def _show_version(wanted: bool) -> None:
    if wanted:
        console.print(f"grip-hf {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Fewer visual tokens for Hugging Face vision-language models."""


app.command("bench")(bench)
app.command("calibrate")(calibrate)
app.command("compare")(compare)
app.command("curve")(curve)
app.command("doctor")(doctor)
app.command("eval")(eval_command)
app.command("pareto")(pareto)
app.command("serve")(serve)
app.command("train", context_settings=MORE)(train_command)
app.command("train-tower")(train_tower)


@app.command()
def demo(
    selectors: Annotated[str, typer.Option(help="Selectors of the summary, separated by commas.")] = (
        "grip,similarity,diversity,cls_attention,grid,random"
    ),
    budgets: Annotated[str, typer.Option(help="Keep ratios of the summary, separated by commas.")] = "0.25,0.11,0.05",
    show: Annotated[str, typer.Option(help="Selector of the table and the picture.")] = "grip",
    keep_ratio: Annotated[float, typer.Option(help="Keep ratio of the table and the picture.")] = 0.11,
    scenes: Annotated[int, typer.Option(min=1, help="Held-out scenes to ask about.")] = 6,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first scene; choose any.")] = 0,
    picture: Annotated[
        Path, typer.Option(callback=in_folder, help="Where to write the picture of the kept tokens.")
    ] = Path("grip_demo.png"),
    testbed: options.Testbed = options.TESTBED,
    json_file: JsonFile = None,
) -> None:
    """Watch a real, trained LLaVA answer questions with all of its visual tokens and with a fraction of them."""
    from transformers.utils.logging import disable_progress_bar

    from grip_hf.pocket.demo import means, run_demo
    from grip_hf.selectors import SELECTORS

    disable_progress_bar()  # each scorer that is loaded would show one

    names = split_list(selectors)
    ratios = [_ratio(text) for text in split_list(budgets)]
    unknown = sorted({*names, show} - set(SELECTORS))
    if unknown:
        raise typer.BadParameter(f"unknown selectors {unknown}; choose from {', '.join(sorted(SELECTORS))}")
    with console.status("loading") as status:
        result = run_demo(names, ratios, (show, _ratio(str(keep_ratio))), scenes, seed, status.update, testbed)
    answers = [{**dataclasses.asdict(row), "of": f"{row.kept}/{row.total}"} for row in result.rows]
    title = f"{show} keeps {keep_ratio:.0%} of the visual tokens"
    console.print(
        Table(ANSWERS, answers, title, lambda row: None if row["full"] == row["pruned"] else "yellow").rich()
    )
    accuracy = means(result.summary)
    asked = result.summary[0].asked
    unpruned = accuracy["none"][1.0]
    title = f"right answers in %, {asked} questions about {scenes} scenes; all tokens: {unpruned:.1f}"
    rows = [{"selector": name, "budget": ratio, "right": accuracy[name][ratio]} for name in names for ratio in ratios]
    console.print(pivot(rows, "keep {:.0%}".format, lambda row: f"{row['right']:.1f}", title=title).rich())
    with failures():
        write_whole(picture, result.picture.save)
        say(f"kept tokens drawn in {picture}")
        say("this model is too small for pruning to save much time: `grip-hf bench` times larger ones")
        if json_file is not None:
            write_json(json_file, result.to_dict())
            say(f"the same as data in {json_file}")


def _ratio(text: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        raise typer.BadParameter(f"keep ratio {text!r} is not a number") from None
    if not 0 < ratio <= 1:
        raise typer.BadParameter(f"keep ratio {text!r} must lie in (0, 1]")
    return ratio
