"""What a run is to do, kept in its folder: the same plan goes on, another one is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..config import check_keep_ratio
from ..errors import CheckpointError, ConfigError
from ..files import write_json
from ..version import __version__
from .checks import check_settings
from .grpo import DEFAULT_REWARDS, grpo_config, reward_functions
from .importance import IMPORTANCES
from .rollout import BudgetRange
from .supervised import training_arguments

METHODS = ("grpo", "relaxed", "warmup")
PLAN = "plan.json"
# Settings that change where a run computes and what it tells, not what it learns.
LOCAL = ("report_to", "use_cpu", "disable_tqdm", "logging_steps", "save_total_limit")


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """What to train and for how long.

    Args:
        output: Folder of the run: `warmup/` and `grpo/` (or `relaxed/`) hold checkpoints and each stage's scorer; the
            folder itself ends up with the final scorer.
        method: What follows the warm-up: "grpo", "relaxed", or "warmup" for nothing.
        warmup_steps: Steps of the warm-up; 0 leaves it out.
        steps: Steps of the method.
        budgets: Keep ratios to train on.
        target: Target of the warm-up.
        share_weight: Weight of its second loss (see `WarmupTrainer`).
        seed: Of weights, order and draws.
        save_every: Steps between checkpoints.
        scorer: Sizes of the scorer that differ from the defaults.
        start: Folder or Hub id of a scorer to go on from; None starts with a fresh one.
        warmup_args: Settings of the warm-up's `TrainingArguments`.
        args: Settings of the method's `GRPOConfig` or `TrainingArguments`.
        options: Further arguments of `make_grpo_trainer` or `RelaxedTrainer`.
        keep_ratio: Budget that the scorer is saved with, for those who ask for none.
        data: What is trained on, as plain data: names of model and dataset, number of questions, ...

    Raises:
        ConfigError: A value is not allowed; those of later stages are looked at too.
    """

    output: Path
    method: str = "grpo"
    warmup_steps: int = 400
    steps: int = 900
    budgets: BudgetRange = dataclasses.field(default_factory=BudgetRange)
    target: str = "combined"
    share_weight: float = 1.0
    seed: int = 0
    save_every: int = 250
    scorer: dict[str, Any] = dataclasses.field(default_factory=dict)
    start: str | None = None
    warmup_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    keep_ratio: float = 0.25
    data: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method must be one of {METHODS}, got {self.method!r}")
        for name in ("warmup_steps", "steps", "save_every", "seed"):
            value, least = getattr(self, name), int(name == "save_every")
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be an integer >= {least}, got {value!r}")
        if self.target not in IMPORTANCES:
            raise ConfigError(f"target must be one of {sorted(IMPORTANCES)}, got {self.target!r}")
        if self.method == "grpo":
            reward_functions(self.options.get("rewards", DEFAULT_REWARDS))
        check_settings({**self.options, "share_weight": self.share_weight})
        if self.method == "relaxed" and self.scorer.get("memory_width"):
            raise ConfigError(
                "method 'relaxed' picks all tokens at once: memory_width must be 0, "
                f"got {self.scorer['memory_width']!r}"
            )
        check_keep_ratio(self.keep_ratio)

    def stages(self) -> dict[str, TrainingArguments]:
        """The stages in their order, with the arguments of their trainers."""
        shared = {"seed": self.seed, "save_steps": self.save_every, "save_total_limit": 2}
        stages: dict[str, TrainingArguments] = {}
        if self.warmup_steps:
            folder, settings = str(self.output / "warmup"), {**shared, **self.warmup_args}
            if self.scorer.get("memory_width"):  # which the warm-up does not train: it ranks what nothing is kept of
                settings["ddp_find_unused_parameters"] = True
            stages["warmup"] = training_arguments(folder, max_steps=self.warmup_steps, **settings)
        if self.steps and self.method != "warmup":
            folder, settings = str(self.output / self.method), {**shared, **self.args}
            make = grpo_config if self.method == "grpo" else training_arguments
            stages[self.method] = make(folder, max_steps=self.steps, **settings)
        return stages

    def facts(self) -> dict[str, Any]:
        """All that decides what is learnt, as plain data."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del found["output"], found["keep_ratio"]
        found["budgets"] = [self.budgets.low, self.budgets.high]
        for name in ("args", "warmup_args"):
            found[name] = {key: value for key, value in found[name].items() if key not in LOCAL}
        return dict(json.loads(json.dumps(found, default=_name)))


def _name(value: Any) -> str:
    """A reward function, say, by its name, which is the same in the next process."""
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def read_plan(folder: Path) -> dict[str, Any] | None:
    """The facts of the run in a folder, or None if it holds none.

    Raises:
        CheckpointError: They cannot be read.
    """
    path = folder / PLAN
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["plan"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): give another output folder") from error


def keep_plan(folder: Path, facts: dict[str, Any], write: bool = True) -> None:
    """Remember the facts of a run in its folder, or find that they are those of the run that it holds.

    Args:
        folder: The folder.
        facts: What decides what is learnt.
        write: Whether this process writes.

    Raises:
        CheckpointError: The folder holds another run; the message names the differences.
        FileError: The folder takes no file.
    """
    known = read_plan(folder)
    if known is None:
        if any(folder.glob("*/scorer/model.safetensors")) or any(folder.glob("*/checkpoint-*")):
            raise CheckpointError(
                f"{folder} holds a run of unknown settings, since it has no {PLAN}: give another output folder"
            )
        if write:
            write_json(folder / PLAN, {"grip_hf": __version__, "plan": facts})
        return
    apart = differences(known, facts)
    if apart:
        raise CheckpointError(
            f"{folder} holds a run with other settings: {'; '.join(apart)}. Give these again to go on with it, or "
            "another output folder"
        )


def differences(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> list[str]:
    """What two sets of facts do not share, in words."""
    found = []
    for name in dict.fromkeys([*there, *here]):
        old, new = there.get(name), here.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name} is {old!r} there, {new!r} here")
    return found
