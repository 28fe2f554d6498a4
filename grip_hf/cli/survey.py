"""What `calibrate` and `curve` ask: a model, what chooses its tokens, and one question about each of many pictures."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .loading import ModelChoice, load_examples
from .screen import say, split_list, tower_choice

if TYPE_CHECKING:
    from ..calibration.chooser import Chooser
    from ..calibration.observe import Observed
    from ..evaluation.towers import TowerChoice
    from ..frozen.data import Examples

Scorer = Annotated[
    str | None,
    typer.Option(help="Folder or Hub id of a scorer, or of a selector's settings; without it, the model's own."),
]
Selector = Annotated[str | None, typer.Option(help="Or: a selector by name.")]
Examples_ = Annotated[int, typer.Option(min=1, help="Questions to ask, each about a picture of its own.")]
Styles = Annotated[str, typer.Option(help="With --pocket: art styles of the scenes, separated by commas.")]


@dataclasses.dataclass(frozen=True)
class Survey:
    """What is asked.

    Args:
        choice: The model.
        scorer: See the option.
        selector: See the option.
        force: Take a scorer that was trained for another model.
        split: Split of the dataset.
        examples: Most questions.
        seed: Of all that is drawn.
        on_bad_row: What a row that cannot be read does.
        styles: Art styles of pocket scenes.
        tower: How many rows of the vision tower stay, and who chooses them; None leaves it to the scorer's settings.
    """

    choice: ModelChoice
    scorer: str | None
    selector: str | None
    force: bool
    split: str | None
    examples: int
    seed: int
    on_bad_row: str
    styles: tuple[str, ...]
    tower: TowerChoice | None = None

    @classmethod
    def of(cls, context: typer.Context) -> Survey:
        """What the options of a command say; raises `BadParameter`."""
        given = context.params
        names = ("scorer", "selector", "force", "split", "examples", "seed", "on_bad_row")
        tower = tower_choice(given["tower_keep_ratio"], given["tower_selector"], given["tower_depth"])
        styles = tuple(split_list(given["styles"]))
        return cls(ModelChoice.of(context), **{name: given[name] for name in names}, styles=styles, tower=tower)

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """The model and its processor, loaded once."""
        return self.choice.load()

    @cached_property
    def rows(self) -> tuple[Examples, dict[str, Any]]:
        """The questions and facts about them."""
        if self.choice.dataset is None:
            from ..pocket.examples import OnePerScene

            rows: Any = OnePerScene(self.examples, self.seed, self.choice.testbed, self.styles)
            return rows, {"dataset": f"{self.choice.testbed} scenes", "styles": list(self.styles)}
        import numpy as np

        from ..frozen.sources import TEST_SPLITS, TRAIN_SPLITS

        wanted = (*TEST_SPLITS, *TRAIN_SPLITS)
        name = self.choice.dataset
        screened = load_examples(name, self.split, self.examples, self.seed, self.on_bad_row, wanted)
        # Questions about one picture go right and wrong together, and would pass for more evidence than they are.
        order = np.random.default_rng(self.seed).permutation(len(screened.groups))
        chosen = np.sort(order[np.unique(screened.groups[order], return_index=True)[1]])
        if len(chosen) < len(order):
            say(f"one question about each of {len(chosen)} pictures is asked, of {len(order)} questions")
        facts = {"dataset": Path(name).name if Path(name).exists() else name, "split": self.split}
        return screened.examples.subset(chosen), {**facts, "bad_rows": len(screened.bad)}

    @property
    def chooser(self) -> Chooser:
        """What chooses the tokens."""
        from ..calibration.chooser import Chooser

        rows = {} if self.tower is None else self.tower.as_settings()
        return Chooser(self.scorer, self.selector, self.force, tower=rows)

    def observe(
        self, budgets: list[float | int], batch_size: int, most: int, metric: str, cpu_time: bool = False
    ) -> tuple[Observed, Any, Any]:
        """Answer all questions; what was seen, what it holds for, and facts about the rows."""
        from accelerate import PartialState

        from ..calibration.observe import observe
        from ..engine.generation import writing
        from ..patch import remove_grip

        (model, processor), (rows, facts) = self.loaded, self.rows
        handle = self.chooser.apply(model)
        made_for = {**handle.identity(), "writing": writing(handle.owner, {})}
        remove_grip(model)
        processes = PartialState()
        seen = observe(
            model, processor, rows, self.chooser, budgets, batch_size, most, metric,
            processes=processes, cpu_time=cpu_time,
        )  # fmt: skip
        return seen, made_for, {**self.choice.facts(), **facts, "clock": "cpu" if cpu_time else "wall"}
