"""Options that mean the same in every command, each declared once."""

import sys
from pathlib import Path
from typing import Annotated

import typer

OLD_NAMES = {
    "batch": "batch-size",
    "rows": "examples",
    "generations": "num-generations",
    "rate": "learning-rate",
    "warmup-rate": "warmup-learning-rate",
    "warmup-batch": "warmup-batch-size",
    "entropy": "entropy-coef",
    "save-every": "save-steps",
    "num-tokens": "budgets",
    "attention": "attn-implementation",
    "samples": "examples",
}


def normal(name: str) -> str:
    """The name of an option as it is declared: with dashes, and in its present spelling."""
    name = name.replace("_", "-")
    return OLD_NAMES.get(name, name)


def words(arguments: list[str] | None = None) -> list[str]:
    """The arguments of a program, with the names of its options as `normal` gives them: for argparse."""
    found = sys.argv[1:] if arguments is None else arguments
    return [_renamed(one) if one.startswith("--") else one for one in found]


def _renamed(word: str) -> str:
    name, mark, value = word[2:].partition("=")
    return f"--{normal(name)}{mark}{value}"


# The default first. Their own module loads numpy, which help would wait for.
TESTBEDS = ("pocket2", "pocket")
TESTBED = TESTBEDS[0]


def _testbed(value: str) -> str:
    """The name of a testbed; raises `BadParameter` for another one."""
    if value not in TESTBEDS:
        raise typer.BadParameter(f"must be one of {', '.join(TESTBEDS)}, got {value!r}")
    return value


def _depth(value: float | None) -> float | None:
    """A number of layers as one, which options give as floats; raises `BadParameter` for what is no depth."""
    if value is None:
        return None
    from ..config import check_tower_depth
    from ..errors import ConfigError

    try:
        return check_tower_depth(int(value) if value >= 1 and value == int(value) else value)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


Pocket = Annotated[bool, typer.Option("--pocket", help="The pocket model and its scenes.")]
Testbed = Annotated[
    str, typer.Option(callback=_testbed, help='Which pocket model and scenes: "pocket2", or the first, "pocket".')
]
PocketModel = Annotated[Path | None, typer.Option(help="Folder of another pocket model than the shipped one.")]
Model = Annotated[str | None, typer.Option(help="Or: id or folder of a model.")]
Dataset = Annotated[str | None, typer.Option(help="With --model: id, folder or file of a dataset.")]
Split = Annotated[str | None, typer.Option(help="Split of the dataset; without it, the one that fits best.")]
Streaming = Annotated[
    bool,
    typer.Option("--streaming", help="Read rows as they come, as many as are asked for, and not the whole dataset."),
]
Pictures = Annotated[
    Path | None,
    typer.Option(
        help="Folder for encoded pictures, which processes and later runs share. Without it, several processes of a "
        "training share one for as long as it takes."
    ),
]
OnBadRow = Annotated[str, typer.Option(help="What a row that cannot be read does: stop, or skip.")]
Budgets = Annotated[str, typer.Option(help="Keep ratios or numbers of visual tokens, separated by commas.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Questions at once.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all that is drawn.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="Dtype of the model; auto is that of its checkpoint.")]
Quantize = Annotated[str | None, typer.Option(help="Load the model in 4bit or 8bit.")]
DeviceMap = Annotated[str | None, typer.Option(help="Device map of the model, for one that needs several devices.")]
Attention = Annotated[str | None, typer.Option("--attn-implementation", help="Attention of the model.")]
TowerRatio = Annotated[
    str | None,
    typer.Option(help="Shares of the vision tower's rows, separated by commas, or auto: each selector also so."),
]
CpuTime = Annotated[
    bool, typer.Option("--cpu-time", help="Count CPU time, not the clock's, on a machine that others use too.")
]
TowerShare = Annotated[
    str | None,
    typer.Option(
        help="Share of the vision tower's rows that stays at every look but that at all tokens, or auto; without it, "
        "that of the scorer's settings, if any."
    ),
]
TowerSelector = Annotated[
    str | None,
    typer.Option(help="What chooses these: a tower selector, or a tower scorer's folder; else the model's own."),
]
TowerDepth = Annotated[
    float | None,
    typer.Option(callback=_depth, help="After how many layers of the tower, or which share of them; else a third."),
]
Metric = Annotated[str, typer.Option(help="When an answer is right: exact, normalized, contains, vqa or anls.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Longest text to write, for a metric other than exact.")]
Force = Annotated[bool, typer.Option("--force", help="Take a scorer that was trained for another model.")]
