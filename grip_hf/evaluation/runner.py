"""Every selector on the same examples: pictures encoded once, answers judged by one rule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..config import check_keep_ratio, count_kept
from ..errors import ConfigError
from ..selection import VisualBatch, topk_mask
from ..selectors.base import Selector
from ..training.data import Examples
from ..training.features import FrozenVLM
from ..training.samples import Sample, answer_ids, stack_visual
from ..training.store import SampleStore, compare
from .metrics import UNPRUNED, Row, table

Scores = Callable[[VisualBatch], Tensor]


class Oracle:
    """Keeps what the examples themselves say is needed (`columns["evidence"]`): an upper bound, not a method."""

    def scores(self, batch: VisualBatch, samples: Sequence[Sample]) -> Tensor:
        """[G, N] float32: falling along each example's evidence.

        Raises:
            ConfigError: An example has no evidence, or one beyond its tokens.
        """
        result = torch.zeros_like(batch.mask, dtype=torch.float32)
        for row, sample in zip(result, samples, strict=True):
            order = sample.example.columns.get("evidence")
            if order is None:
                raise ConfigError("the selector 'oracle' needs examples with a column 'evidence'")
            if order and not 0 <= min(order) <= max(order) < sample.num_visual:
                raise ConfigError(f"evidence must name visual tokens 0 to {sample.num_visual - 1}, got {list(order)}")
            row[list(order)] = torch.arange(len(order), 0, -1, dtype=torch.float32, device=row.device)
        return result


def tap_all(selectors: Iterable[Any]) -> Callable[[Any], list[Any]]:
    """Prepare several selectors on one model; a tap that two of them need is registered once."""

    def tap(model: Any) -> list[Any]:
        handles, covered = [], set[str]()
        for selector in selectors:
            if isinstance(selector, Selector) and not (selector.needs and set(selector.needs) <= covered):
                handles += selector.prepare(model)
                covered |= set(selector.needs)
        return handles

    return tap


def evaluate(
    model: Any,
    processor: Any,
    examples: Examples,
    selectors: Mapping[str, Scores | Oracle],
    budgets: Sequence[float],
    batch_size: int = 64,
    progress: bool = True,
) -> list[Row]:
    """Accuracy of every selector at every budget, and of the unpruned model.

    An answer is right if greedy decoding would write exactly the reference answer. That is read off one forward pass
    with the answer fed in: each of its tokens must be the likeliest one.

    Args:
        model: The model; a patch on it is replaced and removed again.
        processor: Its processor.
        examples: What to ask; `columns["task"]` names the task, where there are several.
        selectors: By the name to report.
        budgets: Keep ratios in (0, 1].
        batch_size: Examples at once.
        progress: Whether to show a progress bar.

    Raises:
        ConfigError: A budget is not allowed, there are no selectors or examples, or a selector merges tokens.
    """
    ratios = [check_keep_ratio(budget) for budget in budgets]
    if not ratios or not len(examples) or batch_size < 1:
        raise ConfigError(
            f"nothing to evaluate: budgets={list(budgets)}, {len(examples)} examples, batch_size={batch_size}"
        )
    merging = sorted(name for name, selector in selectors.items() if hasattr(selector, "merge"))
    if merging:
        raise ConfigError(
            f"selectors {merging} merge dropped tokens into kept ones, which this evaluation of keep-sets would leave "
            "out; evaluate them through apply_grip and generate"
        )
    vlm = FrozenVLM(model, processor, cache_bytes=1 << 28, tap=tap_all(selectors.values()))
    answers: dict[tuple[str, float], dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    try:
        for start in tqdm(range(0, len(examples), batch_size), desc="evaluating", disable=not progress):
            samples = vlm.prepare([examples[row] for row in range(start, min(start + batch_size, len(examples)))])
            tasks = [str(sample.example.columns.get("task", "all")) for sample in samples]
            for key, right in _judge(vlm, samples, selectors, ratios):
                for task, is_right in zip(tasks, right, strict=True):
                    answers[key][task].append(is_right)
    finally:
        vlm.close()
    order = dict.fromkeys(task for by_task in answers.values() for task in by_task)
    return table(answers, order)


@torch.no_grad()
def _judge(
    vlm: FrozenVLM, samples: list[Sample], selectors: Mapping[str, Scores | Oracle], ratios: Sequence[float]
) -> Iterable[tuple[tuple[str, float], list[bool]]]:
    """For the unpruned model and each (selector, ratio): which answers of a batch are right."""
    store = SampleStore(vlm, [])
    full = vlm.full_log_probs(samples)
    yield (UNPRUNED, 1.0), compare(full, full, *answer_ids(samples)).correct.tolist()
    for ratio in ratios:
        counts = torch.tensor([count_kept(sample.num_visual, ratio) for sample in samples])
        batch = stack_visual([sample.visual for sample in samples], counts)
        for name, selector in selectors.items():
            scores = selector.scores(batch, samples) if isinstance(selector, Oracle) else selector(batch)
            chosen = topk_mask(scores.float(), batch.mask, batch.budgets)
            keep = [row[: sample.num_visual] for row, sample in zip(chosen, samples, strict=True)]
            yield (name, ratio), store.judge(samples, keep).correct.tolist()
