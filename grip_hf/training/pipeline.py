"""From nothing to a trained scorer: warm-up, then GRPO or its relaxation, each stage resumable."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainingArguments, set_seed

from ..errors import ConfigError, GripError
from ..frozen.store import SampleStore
from ..hub.resolve import describe_base
from ..scorer.model import GripScorer, GripScorerConfig
from .checkpoints import last_checkpoint, save_scorer
from .checks import check_settings
from .grpo import DEFAULT_REWARDS, grpo_config, make_grpo_trainer, reward_functions
from .importance import IMPORTANCES
from .relaxed import RelaxedTrainer
from .rollout import BudgetRange
from .supervised import training_arguments
from .warmup import WarmupTrainer

METHODS = ("grpo", "relaxed", "warmup")


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """What to train and for how long.

    Args:
        output: Folder of the run: `warmup/` and `grpo/` (or `relaxed/`) hold checkpoints and each stage's scorer; the
            folder itself ends up with the final scorer.
        method: What follows the warm-up: "grpo", "relaxed", or "warmup" for nothing.
        warmup_steps: Steps of the warm-up; 0 starts from a fresh scorer.
        steps: Steps of the method.
        budgets: Keep ratios to train on.
        target: Target of the warm-up.
        seed: Of weights, order and draws.
        save_every: Steps between checkpoints.
        scorer: Sizes of the scorer that differ from the defaults.
        warmup_args: Settings of the warm-up's `TrainingArguments`.
        args: Settings of the method's `GRPOConfig` or `TrainingArguments`.
        options: Further arguments of `make_grpo_trainer` or `RelaxedTrainer`.

    Raises:
        ConfigError: A value is not allowed; those of later stages are looked at too.
    """

    output: Path
    method: str = "grpo"
    warmup_steps: int = 400
    steps: int = 900
    budgets: BudgetRange = dataclasses.field(default_factory=BudgetRange)
    target: str = "combined"
    seed: int = 0
    save_every: int = 250
    scorer: dict[str, Any] = dataclasses.field(default_factory=dict)
    warmup_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

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
        check_settings(self.options)

    def stages(self) -> dict[str, TrainingArguments]:
        """The stages in their order, with the arguments of their trainers."""
        shared = {"seed": self.seed, "save_steps": self.save_every, "save_total_limit": 2}
        stages: dict[str, TrainingArguments] = {}
        if self.warmup_steps:
            folder, settings = str(self.output / "warmup"), {**shared, **self.warmup_args}
            stages["warmup"] = training_arguments(folder, max_steps=self.warmup_steps, **settings)
        if self.steps and self.method != "warmup":
            folder, settings = str(self.output / self.method), {**shared, **self.args}
            make = grpo_config if self.method == "grpo" else training_arguments
            stages[self.method] = make(folder, max_steps=self.steps, **settings)
        return stages


def train_scorer(plan: TrainingPlan, store: SampleStore, callbacks: list[Any] | None = None) -> GripScorer:
    """Run a plan, going on from whatever its output folder holds.

    Returns:
        The trained scorer, which is also in `plan.output`.

    Raises:
        CheckpointError: The folder holds the run of another model.
        ConfigError: transformers or TRL refuses a setting, or the folder cannot be written to.
    """
    stages = plan.stages()
    set_seed(plan.seed)
    width = store.vlm.hidden_size
    scorer = GripScorer(
        GripScorerConfig(hidden_size=width, base_model=describe_base(store.vlm.parts.owner), **plan.scorer)
    )
    nn.Module.to(scorer, store.vlm.device)
    for name, args in stages.items():
        scorer = _stage(plan, name, args, scorer, store, callbacks)
    return scorer


def _stage(
    plan: TrainingPlan, name: str, args: Any, scorer: GripScorer, store: SampleStore, callbacks: list[Any] | None
) -> GripScorer:
    """Run one stage, or load its result if it was finished before."""
    folder, width = plan.output / name, store.vlm.hidden_size
    finished = folder / "scorer"
    if (finished / "model.safetensors").is_file():
        done = GripScorer.from_pretrained(finished)
        if done.config.hidden_size == width:
            nn.Module.to(done, store.vlm.device)
            return done
    checkpoint = last_checkpoint(folder, width)
    try:
        trainer = _trainer(plan, name, args, scorer, store, callbacks)
    except GripError:
        raise
    except (ValueError, RuntimeError, ImportError, OSError) as error:  # a folder, or where metrics should go
        raise ConfigError(f"{name} cannot be set up like this: {error}") from error
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.is_world_process_zero():
        save_scorer(scorer, finished)
        save_scorer(scorer, plan.output)
    trainer.accelerator.wait_for_everyone()
    return scorer.eval()


def _trainer(
    plan: TrainingPlan, name: str, args: Any, scorer: GripScorer, store: SampleStore, callbacks: list[Any] | None
) -> Any:
    shared: dict[str, Any] = {"budgets": plan.budgets, "callbacks": callbacks}
    if name == "warmup":
        return WarmupTrainer(scorer, store, args, target=plan.target, **shared)
    make: Any = RelaxedTrainer if name == "relaxed" else make_grpo_trainer
    return make(scorer, store, args, **shared, **plan.options)
