"""Every method on the same examples: pictures encoded once, answers judged by one rule."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..errors import ConfigError
from ..families.table import find_parts
from ..frozen.data import Examples
from ..frozen.vlm import FrozenVLM
from ..selectors.base import Selector
from ..selectors.inside import InsideSelector
from .answers import AGREEMENT, EXACT
from .budgets import Budget, check_budget
from .columns import Mark, held_share, with_columns
from .methods import Method, Prompts, Pruned, Scores, Unpruned
from .metrics import MEAN, UNPRUNED, Row, average, table

Judged = Scores | Method
Asked = tuple[str, list[str], bool]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        rows: The table.
        marks: Every answer, question by question.
        metric: What the scores are, in words.
        asked: Per question its text and the accepted answers, as they were judged.
    """

    rows: list[Row]
    marks: list[Mark]
    metric: str
    asked: list[tuple[str, list[str]]]

    @property
    def unpruned(self) -> float:
        """The mean score of the unpruned model."""
        return next(row["accuracy"] for row in self.rows if (row["selector"], row["task"]) == (UNPRUNED, MEAN))

    def samples(self) -> Iterator[dict[str, Any]]:
        """One record per answer, as plain data."""
        for one in self.marks:
            question, answers = self.asked[one.row]
            yield {**one._asdict(), "question": question, "answers": answers}


def tap_all(methods: Iterable[Method]) -> Callable[[Any], list[Any]]:
    """Register the taps that several methods need on one model, each once."""

    def tap(model: Any) -> list[Any]:
        handles, covered = [], set[str]()
        for method in methods:
            selector = method.selector if isinstance(method, Pruned) else None
            if isinstance(selector, Selector) and not set(selector.needs) <= covered:
                handles += selector.prepare(model)
                covered |= set(selector.needs)
        return handles

    return tap


def evaluate(
    model: Any,
    processor: Any,
    examples: Examples,
    selectors: Mapping[str, Judged | Sequence[Judged]],
    budgets: Sequence[Budget],
    batch_size: int = 64,
    progress: bool = True,
    processes: PartialState | None = None,
    metric: str = EXACT,
    max_new_tokens: int = 32,
    calibration: bool = False,
    share: Path | None = None,
) -> Evaluation:
    """Score of every selector at every budget, and of the unpruned model, on what the patched model itself generates.

    Args:
        model: The model; a patch on it is replaced and removed again.
        processor: Its processor.
        examples: What to ask; `columns["task"]` names the task, where there are several.
        selectors: By the name to report: a selector or another `Method`, or several trainings of one, whose rows are
            averaged.
        budgets: Keep ratios in (0, 1], or numbers of visual tokens > 1.
        batch_size: Examples at once.
        progress: Whether to show a progress bar; it is shown on a terminal only.
        processes: Shares the batches among the processes of a launch; each gets the whole table, the one that a
            single process would make.
        metric: When an answer is right; see `Prompts`.
        max_new_tokens: Longest text that is written; see `Prompts`.
        calibration: Whether to tell the expected calibration error, for which the logits of answers are kept.
        share: A folder in which processes share encoded pictures; None shares none.

    Raises:
        ConfigError: A budget or the metric is not allowed, or there are no budgets or examples.
        UnsupportedModelError: A selector cannot work with the model.
    """
    asked = [check_budget(budget) for budget in budgets]
    if not asked or not len(examples) or batch_size < 1:
        raise ConfigError(
            f"nothing to evaluate: budgets={list(budgets)}, {len(examples)} examples, batch_size={batch_size}"
        )
    methods = {name: [_method(one) for one in _several(found)] for name, found in selectors.items()}
    every = [one for trainings in methods.values() for one in trainings]
    for one in every:
        one.check(model)
    rank, world = (0, 1) if processes is None else (processes.process_index, processes.num_processes)
    starts = range(rank * batch_size, len(examples), world * batch_size)
    if share is not None:  # pictures with these rows per token beside them
        share = share / (".".join(sorted({need for one in every for need in _needs(one)})) or "plain")
    vlm = FrozenVLM(model, processor, cache_bytes=1 << 28, tap=tap_all(every), share=share)
    batches: list[tuple[list[Mark], list[Asked]]] = []
    try:
        for start in tqdm(starts, desc="evaluating", disable=None if progress and rank == 0 else True):
            vlm.attach()
            rows = range(start, min(start + batch_size, len(examples)))
            samples = vlm.prepare([examples[row] for row in rows])
            prompts = Prompts(vlm, samples, metric, max_new_tokens, calibration)
            batches.append((list(_judge(prompts, methods, asked, start)), _asked(prompts)))
    finally:
        vlm.close()
    if world > 1:
        # Batches dealt out in turn come back in their order, so that rows and tasks stand as one process puts them.
        shards: list[list[Any]] = gather_object([batches])
        batches = [shards[i % world][i // world] for i in range(sum(map(len, shards)))]
    marks = [one for found, _ in batches for one in found]
    questions = [one for _, found in batches for one in found]
    depth = _depth(model)
    table_rows = with_columns(_table(marks), marks, _drops(methods, depth), depth)
    return Evaluation(table_rows, marks, _name(metric, questions), [(one, right) for one, right, _ in questions])


def _needs(method: Method) -> tuple[str, ...]:
    return tuple(getattr(method.selector, "needs", ())) if isinstance(method, Pruned) else ()


def _asked(prompts: Prompts) -> list[Asked]:
    """Per sample the text of its question, the accepted answers, and whether these are the data's own."""
    decode, found = prompts.vlm.processor.tokenizer.decode, []
    for sample in prompts.samples:
        example = sample.example
        said = [part.get("text", "") for one in example.messages for part in one["content"]]
        own = [decode(sample.answer, skip_special_tokens=True).strip()]
        answers = list(example.answers) or ([example.answer] if example.answer is not None else own)
        found.append((" ".join(filter(None, said)), answers, example.answer is not None))
    return found


def _name(metric: str, questions: Sequence[Asked]) -> str:
    """What the scores are: a comparison with the unpruned model's own answers must not pass for accuracy."""
    alone = sum(not own for *_, own in questions)
    if alone == len(questions):
        return AGREEMENT
    return f"{metric} ({AGREEMENT} for {alone} of {len(questions)} without answer)" if alone else metric


def _several(found: Judged | Sequence[Judged]) -> Sequence[Judged]:
    return found if isinstance(found, Sequence) else [found]


def _method(one: Judged) -> Method:
    return one if isinstance(one, Method) else Pruned(one)


def _judge(
    prompts: Prompts, methods: Mapping[str, Sequence[Method]], budgets: Sequence[Budget], first: int
) -> Iterable[Mark]:
    """What every method makes of a batch whose first question has the number `first`, and the unpruned model."""
    tasks = [str(sample.example.columns.get("task", "all")) for sample in prompts.samples]
    trainings = {UNPRUNED: [Unpruned()], **methods}
    depth = _depth(prompts.vlm.model)
    for name, several in trainings.items():
        for number, one in enumerate(several):
            asked = budgets if name != UNPRUNED else [1.0]
            for budget, answers in zip(asked, one.answers(prompts, asked), strict=True):
                for i, (task, answer) in enumerate(zip(tasks, answers, strict=True)):
                    visual = prompts.samples[i].num_visual
                    texts = prompts.samples[i].inputs["input_ids"].shape[1] - visual
                    share = held_share(one, texts, visual, budget, depth)
                    told = (task, answer.score, answer.said, share, answer.confidence)
                    yield Mark(name, number, budget, first + i, *told)


def _depth(model: Any) -> int:
    """Layers of the language model."""
    language_model: Any = find_parts(model).language_model
    return int(language_model.config.num_hidden_layers)


def _drops(methods: Mapping[str, Sequence[Method]], depth: int) -> dict[str, list[int]]:
    """By name the layers that first lack tokens, of selectors inside the language model."""
    selectors: dict[str, Any] = {n: one[0].selector for n, one in methods.items() if isinstance(one[0], Pruned)}
    inside = {name: one for name, one in selectors.items() if isinstance(one, InsideSelector)}
    return {name: [drop for _, drop in one.stages(depth)] for name, one in inside.items()}


def _table(marks: Iterable[Mark]) -> list[Row]:
    """Rows of every method, several trainings of a selector averaged."""
    answers: dict[int, dict[tuple[str, float], dict[str, list[float]]]] = defaultdict(dict)
    for one in marks:
        by_task = answers[one.training].setdefault((one.selector, one.budget), defaultdict(list))
        by_task[one.task].append(one.score)
    order = dict.fromkeys(task for by_task in answers[0].values() for task in by_task)
    rows: dict[tuple[str, float], list[list[Row]]] = defaultdict(list)
    for by_key in answers.values():
        for key, by_task in by_key.items():
            rows[key].append(table({key: by_task}, order))
    return [row for tables in rows.values() for row in average(tables)]
