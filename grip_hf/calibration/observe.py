"""What a model answers with all visual tokens and at each of some budgets, how sure it is, and what that takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..engine import generation
from ..errors import ConfigError
from ..evaluation.answers import EXACT, METRICS
from ..evaluation.budgets import Budget, as_setting, check_budget
from ..evaluation.methods import Pruned
from ..evaluation.runner import tap_all
from ..evaluation.stopwatch import check_clock
from ..files import write_whole
from ..frozen.data import Examples
from ..frozen.samples import Sample
from ..frozen.vlm import FrozenVLM
from ..patch import remove_grip
from ..quality.doubt import ANSWER, FIRST, Doubt, lengths
from .chooser import Chooser
from .encodings import Looks
from .features import Details, Features, of_rows

Array = np.ndarray[Any, Any]
FIELDS = ("answers", "confidences", "firsts", "kept", "totals", "scores")
TOWER = ("vision", "encodings")


@dataclasses.dataclass(frozen=True)
class Observed:
    """What was seen, budget by budget; the last budget is all tokens.

    Attributes:
        budgets: Keep ratios and numbers of visual tokens, rising.
        answers: [budgets, rows, longest] the tokens that were written; -1 behind the end.
        confidences: [budgets, rows] probability of the whole answer.
        firsts: [budgets, rows] probability of its first token.
        kept: [budgets, rows] visual tokens that stayed.
        totals: [rows] visual tokens that there were.
        scores: [budgets, rows] how right the answer is; NaN for rows without one.
        seconds: [budgets] what an answer takes, without encoding the picture.
        cut: Whether an answer was cut off.
        features: What else may tell doubt, if it was asked for: see `features`.
        vision: [budgets] what encoding the picture takes, where rows leave the vision tower; else None.
        encodings: [budgets] the number of the encoding that an answer came from; None if it was one for all.
    """

    budgets: tuple[Budget, ...]
    answers: Array
    confidences: Array
    firsts: Array
    kept: Array
    totals: Array
    scores: Array
    seconds: Array
    cut: bool
    features: Features | None = None
    vision: Array | None = None
    encodings: Array | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.totals)

    def rows(self, chosen: Array) -> Observed:
        """Some of the rows."""
        fields = {name: getattr(self, name)[:, chosen] for name in FIELDS if name != "totals"}
        more = None if self.features is None else self.features.rows(chosen)
        return dataclasses.replace(self, **fields, totals=self.totals[chosen], features=more)

    @property
    def longest(self) -> int:
        """Tokens of the longest answer."""
        return int((self.answers >= 0).sum(-1).max())

    def save(self, path: str | Path) -> None:
        """Write it to an `.npz` file, whole or not at all; raises `FileError`."""
        arrays = {name: getattr(self, name) for name in (*FIELDS, "seconds")}
        if self.features is not None:
            arrays |= {"answer_features": self.features.answers, "row_features": self.features.rows_}
        arrays |= {name: getattr(self, name) for name in TOWER if getattr(self, name) is not None}
        write_whole(path, lambda new: np.savez_compressed(new, budgets=np.array(self.budgets), cut=self.cut, **arrays))

    @classmethod
    def load(cls, path: str | Path) -> Observed:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            budgets = tuple(check_budget(int(one) if one > 1 else float(one)) for one in file["budgets"])
            arrays = {name: file[name] for name in (*FIELDS, "seconds")}
            more = None
            if "answer_features" in file:
                more = Features(file["answer_features"], file["row_features"])
            arrays |= {name: file[name] for name in TOWER if name in file}
            return cls(budgets=budgets, cut=bool(file["cut"]), features=more, **arrays)


def rising(budgets: Sequence[Budget]) -> tuple[Budget, ...]:
    """Budgets in order, all tokens last; raises `ConfigError` if ratios and numbers are mixed, or none is left."""
    found = sorted({check_budget(one) for one in budgets if one != 1})
    if not found or len({type(one) for one in found}) > 1:
        raise ConfigError(f"give keep ratios below 1, or numbers of visual tokens, at least one, got {list(budgets)}")
    return (*found, 1.0)


def observe(
    model: Any,
    processor: Any,
    examples: Examples,
    chooser: Chooser,
    budgets: Sequence[Budget],
    batch_size: int = 16,
    max_new_tokens: int = 32,
    metric: str = EXACT,
    progress: bool = True,
    processes: PartialState | None = None,
    features: bool = False,
    cpu_time: bool = False,
) -> Observed:
    """Answer all examples at every budget and with all tokens, greedily.

    Args:
        model: The model; a patch on it is replaced and removed again.
        processor: Its processor.
        examples: What to ask; answers are not needed.
        chooser: What chooses the tokens.
        budgets: Keep ratios in (0, 1), or numbers of visual tokens > 1.
        batch_size: Examples at once.
        max_new_tokens: Longest answer.
        metric: When an answer is right, where the data has answers.
        progress: Whether to show a bar on a terminal.
        processes: Shares the batches among the processes of a launch; each gets all rows.
        features: Whether to collect what else may tell doubt.
        cpu_time: Whether CPU time counts instead of the clock's, on a machine that others use too; not on a GPU.

    Raises:
        ConfigError: A budget is not allowed, there are no examples, or CPU time is asked for on a GPU.
        UnsupportedModelError: The model or the selector cannot be used.
        GripError: A probability is NaN.
    """
    asked = rising(budgets)
    if not len(examples):
        raise ConfigError("there are no examples to answer")
    check_clock(cpu_time, model.device)
    handle = chooser.apply(model)
    fixed, selector = Chooser.of(handle, chooser.force), handle.selector
    remove_grip(model)
    rank, world = (0, 1) if processes is None else (processes.process_index, processes.num_processes)
    starts = range(rank * batch_size, len(examples), world * batch_size)
    vlm = FrozenVLM(model, processor, cache_bytes=1 << 28, tap=tap_all([Pruned(selector)]))
    batches = []
    try:
        for start in tqdm(starts, desc="answering", disable=None if progress and rank == 0 else True):
            vlm.attach()
            rows = range(start, min(start + batch_size, len(examples)))
            # Without an answer `prepare` would ask for one, which is asked for here at every budget.
            given = [examples[row] for row in rows]
            samples = vlm.prepare([dataclasses.replace(one, answer=one.answer or "") for one in given])
            truths = [one.answer for one in given]
            batches.append(_answer(vlm, samples, truths, fixed, asked, max_new_tokens, metric, features, cpu_time))
    finally:
        vlm.close()
        remove_grip(model)
    if world > 1:
        shards: list[list[Any]] = gather_object([batches])
        batches = [shards[i % world][i // world] for i in range(sum(map(len, shards)))]
    return _join(asked, batches, max_new_tokens)


def _answer(
    vlm: FrozenVLM,
    samples: list[Sample],
    truths: list[str | None],
    chooser: Chooser,
    budgets: tuple[Budget, ...],
    most: int,
    metric: str,
    features: bool,
    cpu_time: bool,
) -> dict[str, Any]:
    """What one batch is answered at every budget, as arrays."""
    model, texts = vlm.model, vlm.collate([one.inputs for one in samples])
    ends, pad, prompt = generation.ends(model, {}), generation.padding(model, {}), texts["input_ids"].shape[1]
    handle = chooser.apply(model)
    found: dict[str, Any] = {name: [] for name in (*FIELDS, "cut", "features")}
    try:
        with Looks(vlm, samples, handle, cpu_time) as looks:
            asked = {"max_new_tokens": most, "do_sample": False, "num_beams": 1, **texts, **looks.pictures}
            for one in budgets:
                doubt = Details() if features else Doubt(ANSWER, None)
                with handle.disabled() if one == 1 else handle.budget(**as_setting(one)), looks.look():
                    written = model.generate(**asked, logits_processor=[doubt])[:, prompt:].cpu()
                own = lengths(written, ends, pad)
                answers = np.full((len(samples), most), -1, dtype=np.int64)
                for row, length in enumerate(own):
                    answers[row, :length] = written[row, :length]
                ended = [bool(set(row[:end].tolist()) & set(ends)) for row, end in zip(written, own, strict=True)]
                found["cut"].append(any(length == most and not end for length, end in zip(own, ended, strict=True)))
                found["answers"].append(answers)
                found["confidences"].append(np.exp(doubt.log_probs(own)))
                found["firsts"].append(np.exp(doubt.log_probs(own, FIRST)))
                last = handle.last
                found["kept"].append([len(kept) for kept in last.kept])
                found["totals"] = last.total
                if isinstance(doubt, Details):
                    found["features"].append(doubt.of_answers(own, last))
                judge, judged = _judge(vlm, metric), zip(answers, samples, truths, strict=True)
                found["scores"].append(
                    [np.nan if truth is None else judge(row[row >= 0], sample) for row, sample, truth in judged]
                )
    finally:
        remove_grip(model)
    found |= {name: np.array(getattr(looks, name)) / len(samples) for name in ("seconds", "vision")}
    found["encodings"] = looks.encodings if looks.drops else None
    found["samples"] = of_rows(samples) if features else None
    return found


def _judge(vlm: FrozenVLM, metric: str) -> Callable[[Array, Sample], float]:
    """How right the tokens of an answer are."""

    def judge(tokens: Array, sample: Sample) -> float:
        if metric == EXACT:
            more = map(vlm.answer_tokens, dict.fromkeys(sample.example.answers[1:]))
            return float(any(np.array_equal(tokens, one.cpu().numpy()) for one in (sample.answer, *more)))
        said = vlm.processor.tokenizer.decode(torch.from_numpy(tokens), skip_special_tokens=True).strip()
        return METRICS[metric](said, sample.example.answers or [str(sample.example.answer)])

    return judge


def _join(budgets: tuple[Budget, ...], batches: list[dict[str, Any]], most: int) -> Observed:
    joined = {name: np.concatenate([np.asarray(one[name]) for one in batches], axis=1) for name in FIELDS[:4]}
    scores = np.concatenate([np.asarray(one["scores"], dtype=np.float64) for one in batches], axis=1)
    longest = max(1, int((joined["answers"] >= 0).sum(-1).max()))
    joined["answers"] = joined["answers"][..., :longest]
    return Observed(
        budgets=budgets,
        **joined,
        totals=np.concatenate([np.asarray(one["totals"]) for one in batches]),
        scores=scores,
        seconds=np.median([one["seconds"] for one in batches], axis=0),
        features=Features.joined(batches) if batches[0]["samples"] is not None else None,
        cut=any(any(one["cut"]) for one in batches),
        **joined_tower([one["vision"] for one in batches], [one["encodings"] for one in batches]),
    )


def joined_tower(visions: Sequence[Any], encodings: Sequence[Any]) -> dict[str, Array]:
    """What encoding takes and which looks share one, of several observations; nothing where all rows stay."""
    if any(one is None for one in encodings):
        return {}
    # Where they differ, as pictures of unequal sizes do at a number of tokens: as many encodings as any needed.
    return {"vision": np.median(visions, axis=0), "encodings": np.max(encodings, axis=0)}
