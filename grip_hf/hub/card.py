"""The model card of a scorer: rendered once from a template, and later refreshed where it is the library's own.

What lies between `<!-- grip_hf: name -->` and `<!-- /grip_hf -->` is the library's and is refreshed, as is its part of
the metadata. Everything else is left as people wrote it, and a marked section that they took out stays out.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image

from ..errors import ConfigError
from ..quality.shown import describe
from ..tables import pivot
from ..version import __version__
from .run import left_by_training

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
        results: The table of `grip-hf eval`: its rows, or the JSON file that it wrote with `--json`. None takes the
            one in the folder that `grip-hf train` left the scorer in.
        measured: Which of the table's selectors is this one; its rows become the metadata's model-index. None takes
            the last stage of the scorer's training, or "grip".
        dataset: What the table was measured on; None takes what the table says.
        training: How it was trained, such as the command; Markdown. None takes the settings in that folder.
        license: Licence of the scorer, an identifier of the Hub.
        picture: What to show at the top, such as `grip_hf.viz.draw_kept` returns: a PIL picture, or a file.
        meta: How the table was made, where it does not say so itself.

    Raises:
        ConfigError: The table has no rows, or not those of `measured`; or the picture cannot be read.
    """

    results: Any = None
    measured: str | None = None
    dataset: str | None = None
    training: str | None = None
    license: str | None = None
    picture: Any = None
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.picture is not None:
            object.__setattr__(self, "picture", _picture(self.picture))
        if self.results is None:
            return
        rows, meta = _rows(self.results)
        object.__setattr__(self, "results", rows)
        object.__setattr__(self, "meta", {**meta, **self.meta})
        if self.measured is None:
            object.__setattr__(self, "measured", (self.meta.get("plan") or {}).get("method", "grip"))
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
    facts = dataclasses.replace(facts, **left_by_training(scorer, facts.results is None, facts.training is None))
    base = (getattr(scorer.config, "base_model", None) if scorer is not None else None) or {}
    base_id, kind = base.get("id"), base.get("model_type")
    data = ModelCardData(
        base_model=base_id,
        base_model_relation="adapter" if base_id else None,
        license=facts.license,
        library_name="grip_hf",
        pipeline_tag="image-text-to-text",
        tags=list(TAGS),
        **_metrics(facts, repo),
    )
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
        budget=_budget(config),
        scorer=_describe(scorer),
        selector=config.selector,
        version=__version__,
        promise=describe(handle.calibration),
        results=_markdown(facts) if facts.results is not None else NOT_SAID["results"],
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
    for name in ("base_model", "base_model_relation", "license", "library_name", "pipeline_tag"):
        if data.get(name) is None and new.get(name) is not None:
            data[name] = new[name]
    if new.eval_results:
        mine = {result.unique_identifier for result in new.eval_results}
        others = [result for result in data.eval_results or [] if result.unique_identifier not in mine]
        data.eval_results = [*others, *new.eval_results]
        data.model_name = data.get("model_name") or new.model_name
    return card


def _budget(config: Any) -> str:
    """The budget of settings in words."""
    if config.quality is not None:
        return f"as many visual tokens as {config.quality:.1%} of the answers need"
    if config.keep_ratio is not None:
        return f"{config.keep_ratio:.0%} of the visual tokens"
    return f"{config.num_tokens} visual tokens"


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


def _rows(source: Any) -> tuple[list[Mapping[str, Any]], Mapping[str, Any]]:
    """The rows of an evaluation table, checked, and what it says of how it was made."""
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
    meta = source.get("meta") if isinstance(source, Mapping) else None
    return list(rows), meta or {}


def _metrics(facts: Facts, repo: str | None) -> dict[str, Any]:
    """The part of the metadata that becomes the model-index: accuracies of this scorer in percent."""
    if facts.results is None:
        return {}
    metric, dataset = facts.meta.get("metric", "accuracy"), _dataset(facts)
    results = [
        EvalResult(
            task_type="visual-question-answering",
            dataset_type=re.sub(r"\W+", "-", dataset).strip("-").lower(),
            dataset_name=dataset,
            dataset_config=str(row["task"]),
            metric_type=re.sub(r"\W+", "_", metric.partition(" (")[0]),
            metric_name=f"{metric} ({row['task']}) keeping {_kept(row['budget'])}",
            metric_config=f"{row['budget']:g}",
            metric_value=round(100 * row["accuracy"], 2),
        )
        for row in facts.results
        if row["selector"] == facts.measured
    ]
    return {"eval_results": results, "model_name": repo.split("/")[-1] if repo else "GRIP scorer"}


def _kept(budget: float | int) -> str:
    """A budget in words."""
    return (
        f"{budget} visual tokens" if isinstance(budget, int) and budget > 1 else f"{budget:.0%} of the visual tokens"
    )


def _dataset(facts: Facts) -> str:
    """What the table was measured on; of a path of somebody's machine only its end."""
    told = facts.meta.get("dataset")
    name = Path(told).name if told and Path(told).is_absolute() else told
    return facts.dataset or name or "held-out questions"


def _markdown(facts: Facts) -> str:
    """Scores in percent, the mean over tasks: selectors by budgets; what was measured and how stands above."""
    means = [row for row in facts.results if row["task"] == MEAN]
    pruned = [row for row in means if row["selector"] != UNPRUNED]
    text = pivot(pruned, lambda budget: f"keep {_kept(budget).partition(' of')[0]}", _cell).markdown()
    full = next((row["accuracy"] for row in means if row["selector"] == UNPRUNED), None)
    below = "" if full is None else f"\n\nWith all visual tokens: {100 * full:.1f} %."
    asked = next((row.get("n") for row in means), None)
    about = f"{facts.meta.get('metric', 'right answers')} in %"
    about = f"{about[0].upper()}{about[1:]}; {_dataset(facts)}" + (f", {asked} questions" if asked else "")
    interval = "; two-sided 95 % intervals" if any("ci95" in row for row in pruned) else ""
    made = ", ".join(f"{name} {number}" for name, number in facts.meta.get("versions", {}).items())
    return f"{about}{interval}:\n\n{text}{below}" + (f" Measured with {made}." if made else "")


def _cell(row: Mapping[str, Any]) -> str:
    value = f"{100 * row['accuracy']:.1f}"
    return value if "ci95" not in row else "{} ({:.1f}–{:.1f})".format(value, *(100 * end for end in row["ci95"]))
