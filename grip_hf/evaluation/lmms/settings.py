"""What `--model_args` may say about pruning, and what lmms-eval's tasks say about generation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

from ...config import GripConfig
from ...errors import ConfigError
from ...patch import apply_grip
from ...selectors import SELECTORS

NEW_TOKENS = 1024  # as lmms-eval's own llava_hf, for tasks that do not say


@dataclasses.dataclass(frozen=True)
class Pruning:
    """How a model is pruned once it is loaded; checked before that, because loading may take minutes.

    Args:
        keep_ratio: Share of the visual tokens to keep, in (0, 1]; 1 gives the unpruned model's answers.
        num_tokens: Or their number, >= 1. Without either the budget is the one saved with the scorer.
        selector: Name of a selector. None takes the scorer, or the one that came with the checkpoint.
        scorer: Folder or Hub id of a scorer.
        scope: "sample" shares the budget over all images of a sample, "image" gives each its own.
        seed: For selectors that draw at random.

    Raises:
        ConfigError: A setting is not allowed, or a selector is given beside a scorer.
    """

    keep_ratio: float | None = None
    num_tokens: int | None = None
    selector: str | None = None
    scorer: str | None = None
    scope: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        budget = (self.keep_ratio, self.num_tokens) != (None, None)
        if not budget and self.scorer is None and self.selector not in (None, "grip"):
            raise ConfigError(f"selector={self.selector!r} needs a budget: give keep_ratio=... or num_tokens=...")
        if self.selector not in (None, *SELECTORS):
            raise ConfigError(f"unknown selector {self.selector!r}; known ones are {sorted(SELECTORS)}")
        if self.scorer is not None and self.selector not in (None, "grip"):
            raise ConfigError(f"give a selector or a scorer, got selector={self.selector!r}, scorer={self.scorer!r}")
        GripConfig(**(self.overrides() if budget else {"keep_ratio": 1.0, **self.overrides()}))

    def overrides(self) -> dict[str, Any]:
        """The settings of `GripConfig` that were given."""
        given = dataclasses.asdict(self)
        return {name: value for name, value in given.items() if name != "scorer" and value is not None}

    def apply(self, model: Any) -> None:
        """Prune a model; see `apply_grip` for what it raises."""
        apply_grip(model, scorer=self.scorer, **self.overrides())


def split_arguments(arguments: Mapping[str, Any]) -> tuple[Pruning, dict[str, Any]]:
    """Split what the user wrote into what is about pruning and the rest."""
    names = {field.name for field in dataclasses.fields(Pruning)}
    pruning = {name: value for name, value in arguments.items() if name in names}
    return Pruning(**pruning), {name: value for name, value in arguments.items() if name not in names}


def generation_arguments(task: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Arguments of `generate` for what a task asks for, and the names that `generate` does not know.

    As in lmms-eval's own classes for chat models, a temperature of 0 (the default) is greedy whatever `do_sample`
    says, and the strings in `until` do not end an answer: their default, a blank line, would cut longer ones.
    """
    wanted = {"max_new_tokens": NEW_TOKENS, "num_beams": 1, **task}
    wanted.pop("until", None)
    temperature = wanted.pop("temperature", None) or 0
    wanted["do_sample"] = temperature > 0
    if temperature > 0:
        wanted["temperature"] = float(temperature)
    else:  # do not let the checkpoint's defaults for sampling in
        wanted.update(temperature=None, top_p=None, top_k=None)
    known = vars(GenerationConfig())
    unknown = sorted(name for name in wanted if name not in known)
    return {name: value for name, value in wanted.items() if name in known}, unknown
