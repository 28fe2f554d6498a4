"""Every method on the same examples: pictures encoded once, answers judged by one rule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..config import check_keep_ratio
from ..errors import ConfigError
from ..frozen.data import Examples
from ..frozen.vlm import FrozenVLM
from ..selectors.base import Selector
from .methods import Method, Prompts, Pruned, Scores, Unpruned
from .metrics import UNPRUNED, Row, average, table

Judged = Scores | Method
# One line per answer: which method, its training, the keep ratio, the task, right or wrong.
Mark = tuple[str, int, float, str, bool]


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
    budgets: Sequence[float],
    batch_size: int = 64,
    progress: bool = True,
    processes: PartialState | None = None,
) -> list[Row]:
    """Accuracy of every selector at every budget, and of the unpruned model.

    An answer is right if the patched model's `generate`, decoding greedily, writes exactly the reference answer.

    Args:
        model: The model; a patch on it is replaced and removed again.
        processor: Its processor.
        examples: What to ask; `columns["task"]` names the task, where there are several.
        selectors: By the name to report: a selector or another `Method`, or several trainings of one, whose rows are
            averaged.
        budgets: Keep ratios in (0, 1].
        batch_size: Examples at once.
        progress: Whether to show a progress bar.
        processes: Shares the batches among the processes of a launch; each gets the whole table, the one that a
            single process would make.

    Raises:
        ConfigError: A budget is not allowed, or there are no budgets or examples.
        UnsupportedModelError: A selector cannot work with the model.
    """
    ratios = [check_keep_ratio(budget) for budget in budgets]
    if not ratios or not len(examples) or batch_size < 1:
        raise ConfigError(
            f"nothing to evaluate: budgets={list(budgets)}, {len(examples)} examples, batch_size={batch_size}"
        )
    methods = {name: [_method(one) for one in _several(found)] for name, found in selectors.items()}
    every = [one for trainings in methods.values() for one in trainings]
    for one in every:
        one.check(model)
    rank, world = (0, 1) if processes is None else (processes.process_index, processes.num_processes)
    starts = range(rank * batch_size, len(examples), world * batch_size)
    vlm = FrozenVLM(model, processor, cache_bytes=1 << 28, tap=tap_all(every))
    marks: list[list[Mark]] = []
    try:
        for start in tqdm(starts, desc="evaluating", disable=not progress or rank > 0):
            vlm.attach()
            samples = vlm.prepare([examples[row] for row in range(start, min(start + batch_size, len(examples)))])
            marks.append(list(_judge(Prompts(vlm, samples), methods, ratios)))
    finally:
        vlm.close()
    if world > 1:
        # Batches dealt out in turn come back in their order, so that rows and tasks stand as one process puts them.
        shards: list[list[list[Mark]]] = gather_object([marks])
        marks = [shards[i % world][i // world] for i in range(sum(map(len, shards)))]
    return _table([one for batch in marks for one in batch], methods)


def _several(found: Judged | Sequence[Judged]) -> Sequence[Judged]:
    return found if isinstance(found, Sequence) else [found]


def _method(one: Judged) -> Method:
    return one if isinstance(one, Method) else Pruned(one)


def _judge(prompts: Prompts, methods: Mapping[str, Sequence[Method]], ratios: Sequence[float]) -> Iterable[Mark]:
    """What every method makes of a batch, and the unpruned model."""
    tasks = [str(sample.example.columns.get("task", "all")) for sample in prompts.samples]
    for task, right in zip(tasks, Unpruned().answers(prompts, [1.0])[0], strict=True):
        yield UNPRUNED, 0, 1.0, task, right
    for name, trainings in methods.items():
        for number, one in enumerate(trainings):
            for ratio, answers in zip(ratios, one.answers(prompts, ratios), strict=True):
                for task, right in zip(tasks, answers, strict=True):
                    yield name, number, ratio, task, right


def _table(marks: Iterable[Mark], methods: Mapping[str, Sequence[Method]]) -> list[Row]:
    """Rows of every method, several trainings of a selector averaged."""
    answers: dict[int, dict[tuple[str, float], dict[str, list[bool]]]] = defaultdict(dict)
    for name, number, ratio, task, right in marks:
        answers[number].setdefault((name, ratio), defaultdict(list))[task].append(right)
    order = dict.fromkeys(task for by_task in answers[0].values() for task in by_task)
    rows: dict[tuple[str, float], list[list[Row]]] = defaultdict(list)
    for by_key in answers.values():
        for key, by_task in by_key.items():
            rows[key].append(table({key: by_task}, order))
    return [row for tables in rows.values() for row in average(tables)]
