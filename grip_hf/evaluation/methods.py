"""What is judged: ways to answer a batch of prompts with fewer visual tokens, each through `generate` itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..engine.keepsets import VisualBatch
from ..errors import ConfigError
from ..frozen.samples import Sample
from ..frozen.vlm import FrozenVLM, pictures
from ..patch import apply_grip, remove_grip
from ..selectors.inside import InsideSelector
from .answers import EXACT, METRICS, check_metric
from .budgets import Budget, as_setting, kept_of
from .confidence import confidences

Scores = Callable[[VisualBatch], Tensor]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model wrote, without special tokens, how right that is, in [0, 1], and how probable, if asked for."""

    score: float
    said: str
    confidence: float | None = None


class Prompts:
    """A batch of prompts with encoded pictures, to be asked again and again.

    Args:
        vlm: Who is asked.
        samples: What.
        metric: "exact" wants the tokens of an answer and nothing more; the others are in `answers.METRICS`. Samples
            without an answer are compared with what the unpruned model says, token by token.
        max_new_tokens: Longest text that is written for a metric other than "exact".
        calibration: Whether answers come with their probability; the logits of a whole batch are kept for it.
    """

    def __init__(
        self,
        vlm: FrozenVLM,
        samples: Sequence[Sample],
        metric: str = EXACT,
        max_new_tokens: int = 32,
        calibration: bool = False,
    ) -> None:
        self.vlm, self.samples, self.metric, self.calibration = vlm, samples, check_metric(metric), calibration
        self.accepted = [
            [sample.answer, *map(vlm.answer_tokens, dict.fromkeys(sample.example.answers[1:]))] for sample in samples
        ]
        longest = max(len(one) for accepted in self.accepted for one in accepted)
        self.longest = longest if metric == EXACT else max(longest, max_new_tokens)
        self.inputs: dict[str, Any] = vlm.collate([sample.inputs for sample in samples])
        self.pictures = pictures([sample.encoded for sample in samples])

    @cached_property
    def pixels(self) -> list[Tensor]:
        """Per sample the pixels of its pictures [pictures, ...]."""
        return [self.vlm.process(sample.example)["pixel_values"] for sample in self.samples]

    @cached_property
    def anew(self) -> dict[str, Any]:
        """In the place of `pictures`, pixels to be encoded again."""
        return self.vlm.pixels(self.samples)

    def said(self, inputs: dict[str, Any]) -> tuple[Tensor, list[float] | None]:
        """What greedy decoding writes from `inputs`, and the probability of each text, if it is asked for.

        Returns:
            [B, A] long, up to the longest answer; -1 behind its end.
        """
        model = self.vlm.model
        output = model.generate(
            **inputs,
            max_new_tokens=self.longest,
            do_sample=False,
            num_beams=1,
            suppress_tokens=list(self.vlm.parts.token_ids),  # as in the answers that the model itself gives
            return_dict_in_generate=True,
            output_scores=self.calibration,
        )
        written = output.sequences[:, inputs["input_ids"].shape[1] :]
        sure = confidences(written, output.scores, _ends(model)) if self.calibration else None
        return torch.nn.functional.pad(written, (0, self.longest - written.shape[1]), value=-1), sure

    def judged(self, inputs: dict[str, Any]) -> list[Answer]:
        """Per sample what greedy decoding from `inputs` writes, and how right that is."""
        decode = self.vlm.processor.tokenizer.decode
        written, sure = self.said(inputs)
        found = []
        for i, (row, sample, accepted) in enumerate(zip(written, self.samples, self.accepted, strict=True)):
            text = decode(row[row >= 0], skip_special_tokens=True).strip()
            if self.metric == EXACT or sample.example.answer is None:
                score = float(any(torch.equal(row[: len(one)], one) for one in accepted))
            else:
                score = METRICS[self.metric](text, sample.example.answers or [sample.example.answer])
            found.append(Answer(score, text, None if sure is None else sure[i]))
        return found


def _ends(model: Any) -> set[int]:
    """Tokens that end what the model writes."""
    ends = model.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [ends]) - {None}


@runtime_checkable
class Method(Protocol):
    """A way to use fewer visual tokens."""

    def check(self, model: Any) -> None:
        """Raise `GripError` if the model cannot be used like this; leaves it as it is, without a patch."""
        ...

    def answers(self, prompts: Prompts, budgets: Sequence[Budget]) -> list[list[Answer]]:
        """Per budget and sample the answer; leaves the model without a patch."""
        ...


class Unpruned:
    """All visual tokens."""

    def check(self, model: Any) -> None:
        """Any model will do."""

    def answers(self, prompts: Prompts, budgets: Sequence[Budget]) -> list[list[Answer]]:
        """The same at every budget."""
        remove_grip(prompts.vlm.model)
        return [prompts.judged({**prompts.inputs, **prompts.pictures})] * len(budgets)

    def held(self, total: int, budget: Budget, depth: int) -> list[int]:
        """Visual tokens that each of `depth` layers of the language model sees."""
        return [total] * depth


class Pruned:
    """A selector behind `apply_grip`, as a user would have it.

    Args:
        selector: The selector.
        **tower: Settings of `apply_grip` for the vision tower, which then encodes the pictures anew at each budget.
    """

    def __init__(self, selector: Scores, **tower: Any) -> None:
        self.selector, self.tower = selector, tower

    def _apply(self, model: Any) -> Any:
        return apply_grip(model, num_tokens=1, selector=self.selector, **self.tower)

    def check(self, model: Any) -> None:
        """The selector must be able to work with the model."""
        remove_grip(self._apply(model))

    def answers(self, prompts: Prompts, budgets: Sequence[Budget]) -> list[list[Answer]]:
        """Patch once, then ask at each budget."""
        model = self._apply(prompts.vlm.model)
        shown = prompts.pictures
        if self.tower:
            shown = prompts.anew
        found = []
        try:
            for budget in budgets:
                with model.grip.budget(**as_setting(budget)):
                    found.append(prompts.judged({**prompts.inputs, **shown}))
        finally:
            remove_grip(model)
        return found

    def held(self, total: int, budget: Budget, depth: int) -> list[int]:
        """Visual tokens that each of `depth` layers of the language model sees; those inside it see more at first."""
        kept = kept_of(total, budget)
        if isinstance(self.selector, InsideSelector):
            return self.selector.held(total, kept, depth)
        return [kept] * depth


class Oracle:
    """Keeps what the examples themselves say is needed (`columns["evidence"]`): a yardstick, not a method."""

    def check(self, model: Any) -> None:
        """Any model will do."""

    def answers(self, prompts: Prompts, budgets: Sequence[Budget]) -> list[list[Answer]]:
        """Ask with the evidence of these samples."""
        return Pruned(partial(self.scores, samples=prompts.samples)).answers(prompts, budgets)

    def held(self, total: int, budget: Budget, depth: int) -> list[int]:
        """Visual tokens that each of `depth` layers of the language model sees."""
        return [kept_of(total, budget)] * depth

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
