"""The model card of a scorer: rendered once from a template, and later refreshed where it is the library's own.

What lies between `<!-- grip_hf: name -->` and `<!-- /grip_hf -->` is the library's and is refreshed, as is its part of
the metadata. Everything else is left as people wrote it, and a marked section that they took out stays out.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image

from ..errors import ConfigError
from ..tables import pivot

TEMPLATE = "model_card_template.md"
TAGS = ("grip", "visual-token-pruning", "trl")
SECTION = re.compile(r"<!-- grip_hf: (\w+) -->\n(.*?)<!-- /grip_hf -->", re.DOTALL)
PICTURE = "kept_tokens.png"
NOT_SAID = {"results": "Not measured yet.", "training": "Not described.", "picture": ""}
UNPRUNED, MEAN = "unpruned", "mean"
NEEDED = ("selector", "budget", "task", "accuracy")


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a card can tell beside what the scorer itself says.

    Args:
        results: The table of `grip-hf eval`: its rows, or the JSON file that it wrote with `--json`.
        measured: Which of the table's selectors is this one; its rows become the metadata's model-index.
        dataset: What the table was measured on.
        training: How it was trained, such as the command; Markdown.
        license: Licence of the scorer, an identifier of the Hub.
        picture: What to show at the top, such as `grip_hf.viz.draw_kept` returns: a PIL picture, or a file.

    Raises:
        ConfigError: The table has no rows, or not those of `measured`; or the picture cannot be read.
    """

    results: Any = None
    measured: str = "grip"
    dataset: str = "held-out questions"
    training: str | None = None
    license: str | None = None
    picture: Any = None

    def __post_init__(self) -> None:
        if self.picture is not None:
            object.__setattr__(self, "picture", _picture(self.picture))
        if self.results is None:
            return
        object.__setattr__(self, "results", _rows(self.results))
        known = sorted({str(row["selector"]) for row in self.results})
        if self.measured not in known:
            raise ConfigError(f"measured={self.measured!r} must be a selector of the results, one of {known}")


def template_text() -> str:
    """The template: package data, or beside the package when it is used from its source tree."""
    here = Path(__file__).parents[1]
    for folder in (here, here.parent):
        if (folder / TEMPLATE).is_file():
            return (folder / TEMPLATE).read_text(encoding="utf-8")
    raise ConfigError(f"{TEMPLATE} is missing beside {here}; reinstall grip-hf")


def make_card(handle: Any, facts: Facts, repo: str | None = None, old: str | None = None) -> ModelCard:
    """The card of what `handle` saves.

    Args:
        handle: The `GripHandle`.
        facts: What it cannot know.
        repo: Id of the repository that the card is for, if any.
        old: Text of the card that is there already; what people wrote in it is kept.
    """
    scorer, config = handle.scorer, handle.config
    base = (getattr(scorer.config, "base_model", None) if scorer is not None else None) or {}
    base_id, kind = base.get("id"), base.get("model_type")
    data = ModelCardData(
        base_model=base_id,
        license=facts.license,
        library_name="grip_hf",
        pipeline_tag="image-text-to-text",
        tags=list(TAGS),
        **_metrics(facts, repo),
    )
    ratio = f"{config.keep_ratio:.0%}" if config.keep_ratio is not None else f"{config.num_tokens}"
    fresh = ModelCard.from_template(
        data,
        template_str=template_text(),
        title=repo.split("/")[-1] if repo else "GRIP scorer",
        repo=repo or "path/to/this/folder",
        base_id=base_id or "path/to/the/base/model",
        base=f"[{base_id}](https://huggingface.co/{base_id})"
        if base_id
        else f"a `{kind}` model"
        if kind
        else "any model",
        budget=f"{ratio} of the visual tokens" if config.keep_ratio is not None else f"{ratio} visual tokens",
        scorer=_describe(scorer),
        selector=config.selector,
        version=version("grip-hf"),
        results=_markdown(facts.results) if facts.results is not None else NOT_SAID["results"],
        training=facts.training or NOT_SAID["training"],
        picture=NOT_SAID["picture"] if facts.picture is None else f"![visual tokens that stay]({PICTURE})",
    )
    if old is None:
        return fresh
    said = {name for name in NOT_SAID if getattr(facts, name) is None}
    return _refreshed(ModelCard(old, ignore_metadata_errors=True), fresh, said)


def _refreshed(card: ModelCard, fresh: ModelCard, keep: set[str]) -> ModelCard:
    """`card` with the library's sections and metadata of `fresh`; sections in `keep` have nothing new to tell."""
    sections = {match[1]: match[0] for match in SECTION.finditer(fresh.text)}
    card.text = SECTION.sub(
        lambda match: match[0] if match[1] in keep else sections.get(match[1], match[0]), card.text
    )
    new, data = cast(ModelCardData, fresh.data), cast(ModelCardData, card.data)
    data.tags = list(dict.fromkeys([*(data.tags or []), *(new.tags or [])]))
    for name in ("base_model", "license", "library_name", "pipeline_tag"):
        if data.get(name) is None and new.get(name) is not None:
            data[name] = new[name]
    if new.eval_results:
        mine = {result.unique_identifier for result in new.eval_results}
        others = [result for result in data.eval_results or [] if result.unique_identifier not in mine]
        data.eval_results = [*others, *new.eval_results]
        data.model_name = data.get("model_name") or new.model_name
    return card


def _describe(scorer: Any) -> str:
    if scorer is None:
        return "none: this selector learns nothing"
    sizes, count = scorer.config, sum(weight.numel() for weight in scorer.parameters())
    reads = "reads the question" if sizes.query_aware else "does not read the question"
    return f"{count:,} parameters, for hidden size {sizes.hidden_size}, {reads}"


def _picture(source: Any) -> Image.Image:
    """A picture, read to its end."""
    if isinstance(source, Image.Image):
        return source
    try:
        with Image.open(source) as opened:
            return opened.convert("RGB")
    except (OSError, AttributeError, SyntaxError, ValueError) as error:
        raise ConfigError(f"picture={source!r} must be a picture or a file of one: {error}") from error


def _rows(source: Any) -> list[Mapping[str, Any]]:
    """The rows of an evaluation table, checked."""
    if isinstance(source, (str, os.PathLike)):
        try:
            source = json.loads(Path(source).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"results={os.fspath(source)!r} cannot be read: {error}") from error
    rows = source.get("rows") if isinstance(source, Mapping) else source
    if not isinstance(rows, Sequence) or not rows or not all(isinstance(row, Mapping) for row in rows):
        raise ConfigError(f"results must be the rows of an evaluation table, got {type(source).__name__}")
    for row in rows:
        if set(NEEDED) - set(row):
            raise ConfigError(f"a row of the results must have {NEEDED}, got {dict(row)}")
    return list(rows)


def _metrics(facts: Facts, repo: str | None) -> dict[str, Any]:
    """The part of the metadata that becomes the model-index: accuracies of this scorer in percent."""
    if facts.results is None:
        return {}
    results = [
        EvalResult(
            task_type="visual-question-answering",
            dataset_type=re.sub(r"\W+", "-", facts.dataset).strip("-").lower(),
            dataset_name=facts.dataset,
            dataset_config=str(row["task"]),
            metric_type="accuracy",
            metric_name=f"accuracy ({row['task']}) keeping {row['budget']:.0%} of the visual tokens",
            metric_config=f"{row['budget']:g}",
            metric_value=round(100 * row["accuracy"], 2),
        )
        for row in facts.results
        if row["selector"] == facts.measured
    ]
    return {"eval_results": results, "model_name": repo.split("/")[-1] if repo else "GRIP scorer"}


def _markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """Right answers in percent, the mean over tasks: selectors by budgets."""
    means = [row for row in rows if row["task"] == MEAN]
    pruned = [row for row in means if row["selector"] != UNPRUNED]
    text = pivot(pruned, lambda budget: f"keep {budget:.0%}", lambda row: f"{100 * row['accuracy']:.1f}").markdown()
    full = next((row["accuracy"] for row in means if row["selector"] == UNPRUNED), None)
    below = "" if full is None else f"\n\nWith all visual tokens: {100 * full:.1f} %."
    return f"Right answers in %:\n\n{text}{below}"
