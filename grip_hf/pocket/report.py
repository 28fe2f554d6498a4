"""How good a shipped pocket LLaVA is: `python -m grip_hf.pocket.report --testbed pocket --scenes 2000 --seed 0`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from grip_hf.pocket.lessons import PocketTrainer, count_right
from grip_hf.pocket.lessons2 import make_trainer
from grip_hf.pocket.model import load_pocket
from grip_hf.pocket.scenes import make_scene
from grip_hf.pocket.sprites import STYLES
from grip_hf.pocket.testbeds import DEFAULT, TESTBEDS
from grip_hf.tables import Column, Table

COLUMNS = (
    Column("kind", "kind", left=True),
    Column("right", "accuracy", "{:.1%}"),
    Column("chance", "chance", "{:.1%}"),
    Column("questions", "n"),
)


def accuracies(
    trainer: PocketTrainer, scenes: int, seed: int = 0, styles: Sequence[str] = STYLES[:2]
) -> dict[str, dict[str, float]]:
    """Accuracy of the unpruned model, number of questions and chance level, per kind, on held-out scenes.

    Args:
        trainer: Holds the model.
        scenes: Number of scenes.
        seed: Seed of the first scene.
        styles: Art styles of the objects.
    """
    mode = trainer.training
    trainer.eval()
    testbed = trainer.testbed
    counts = count_right(trainer, [make_scene(seed + i, "test", tuple(styles), testbed.name) for i in range(scenes)])
    trainer.train(mode)
    return {
        kind: {"accuracy": right / max(asked, 1), "n": asked, "chance": testbed.chance[kind]}
        for kind, (right, asked) in counts.items()
    }


def report(
    testbed: Annotated[str, typer.Option(help=f"Which testbed: {' or '.join(TESTBEDS)}.")] = DEFAULT.name,
    scenes: Annotated[int, typer.Option(min=1, help="Held-out scenes.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first scene.")] = 0,
    styles: Annotated[str, typer.Option(help=f"Art styles, separated by commas, of {', '.join(STYLES)}.")] = (
        ",".join(STYLES[:2])
    ),
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the table as data.")] = None,
) -> None:
    """Ask a shipped pocket LLaVA all questions of held-out scenes, with all of its visual tokens."""
    chosen = tuple(style.strip() for style in styles.split(","))
    rows = accuracies(make_trainer(load_pocket(testbed)[0], testbed), scenes, seed, chosen)
    title = f"unpruned LLaVA of {testbed}, {scenes} held-out scenes from seed {seed}, styles {styles}"
    Console().print(Table(COLUMNS, [{"kind": kind, **row} for kind, row in rows.items()], title).rich())
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(report)
