"""GRPO on keep-sets with the unmodified `trl.GRPOTrainer`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, cast

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from ..config import count_kept
from ..errors import ConfigError
from ..frozen.store import SampleStore
from ..scorer.model import GripScorer
from .checks import check_copies, check_settings
from .policy import PruningPolicy, keep_set_tokenizer
from .rewards import REWARDS, Reward, checked
from .rollout import BudgetRange, make_rollout

GRPO_DEFAULTS: dict[str, Any] = {
    "loss_type": "dr_grpo",
    "scale_rewards": "group",  # "batch" leaves little signal to large budgets, where all members do well
    "num_generations": 8,
    "entropy_coef": 0.001,  # the policy loss is divided by the longest completion, the entropy is not
    "per_device_train_batch_size": 64,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "max_grad_norm": 1.0,
    "logging_steps": 10,
    "report_to": "none",
    "ddp_find_unused_parameters": False,  # every weight of a scorer is used in every step
}
DEFAULT_REWARDS = ("closeness", "correctness")
# What the mapping of keep-sets to completions relies on.
GRPO_FIXED: dict[str, Any] = {
    "bf16": False,  # scores would lose their order
    "fp16": False,
    "gradient_checkpointing": False,
    "mask_truncated_completions": False,  # no keep-set ends with an end-of-sequence token
    "remove_unused_columns": False,
    "disable_dropout": False,
}


def grpo_config(output_dir: str, **overrides: Any) -> GRPOConfig:
    """A `GRPOConfig` with defaults that suit keep-sets.

    Raises:
        ConfigError: A setting makes no sense, is one that keep-sets cannot work with, or TRL refuses it.
    """
    check_settings(overrides)
    wrong = {name: overrides[name] for name, value in GRPO_FIXED.items() if overrides.get(name, value) != value}
    if wrong:
        raise ConfigError(f"training keep-sets needs { ({name: GRPO_FIXED[name] for name in wrong}) }, got {wrong}")
    try:
        return GRPOConfig(output_dir=output_dir, **{**GRPO_DEFAULTS, **overrides, **GRPO_FIXED})
    except ValueError as error:
        raise ConfigError(f"GRPO cannot be set up like this: {error}") from error


def reward_functions(rewards: Sequence[str | Reward]) -> list[Reward]:
    """The functions that names stand for; raises `ConfigError` if one is unknown, or there are none."""
    unknown = [one for one in rewards if not callable(one) and one not in REWARDS]
    if unknown or not rewards:
        raise ConfigError(f"rewards must be functions or among {sorted(REWARDS)}, got {list(rewards)}")
    return [REWARDS[one] if isinstance(one, str) else one for one in rewards]


def make_grpo_trainer(
    scorer: GripScorer,
    store: SampleStore,
    args: GRPOConfig,
    rewards: Sequence[str | Reward] = DEFAULT_REWARDS,
    budgets: BudgetRange | tuple[float, float] = BudgetRange(),  # noqa: B008  (frozen)
    greedy: bool = False,
    num_actions: int | None = None,
    **kwargs: Any,
) -> GRPOTrainer:
    """Build the trainer; `trainer.train()` then trains `scorer` in place.

    Args:
        scorer: The scorer to train, best after warm-up.
        store: The examples.
        args: From `grpo_config`, or a `GRPOConfig` of your own. With `beta > 0` the reference is the scorer as it is
            now: it is written to `args.output_dir` first.
        rewards: Names of `REWARDS` or functions like them; `args.reward_weights` weighs them.
        budgets: Keep ratios to draw from.
        greedy: Whether each group has a greedy member as part of its baseline.
        num_actions: Largest number of visual tokens of an example; None looks at the first examples.
        **kwargs: Further arguments of `GRPOTrainer`, such as `callbacks`.

    Raises:
        ConfigError: A reward or a setting is unknown or not allowed, or the launch would share out the scorer.
    """
    check_copies(args)
    functions = [checked(one) for one in reward_functions(rewards)]
    wrong = {name: getattr(args, name) for name, value in GRPO_FIXED.items() if getattr(args, name) != value}
    if wrong:
        raise ConfigError(f"training keep-sets needs { ({name: GRPO_FIXED[name] for name in wrong}) }, got {wrong}")
    budgets = budgets if isinstance(budgets, BudgetRange) else BudgetRange(*budgets)
    if num_actions is None:
        num_actions = max(sample.num_visual for sample in store.samples(range(min(8, len(store.examples)))))
    args.max_completion_length = count_kept(num_actions, budgets.high)
    policy = PruningPolicy.around(scorer, store, num_actions)
    if args.beta:
        _write_reference(policy, args)
    prompts = Dataset.from_dict({"row": range(len(store.examples))}).with_transform(_prompts)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are using 'rollout_func'")  # an experiment of TRL's: our tests watch it
        trainer = GRPOTrainer(
            model=policy,
            reward_funcs=cast(Any, functions),
            args=args,
            train_dataset=prompts,
            processing_class=keep_set_tokenizer(num_actions),
            rollout_func=make_rollout(store, budgets, greedy),
            **kwargs,
        )
    if trainer.ref_model is not None:
        trainer.accelerator.unwrap_model(trainer.ref_model).attach(store)
    return trainer


def _prompts(batch: dict[str, list[int]]) -> dict[str, Any]:
    """Prompts that name rows, made when they are asked for: a million rows never are a million messages."""
    return {"prompt": [[{"role": "user", "content": f"row {row}", "row": row}] for row in batch["row"]]}


def _write_reference(policy: PruningPolicy, args: GRPOConfig) -> None:
    """Put the policy where TRL looks for the reference: it loads one from the folder that the config names."""
    folder = f"{args.output_dir}/reference"
    with args.main_process_first(desc="writing the reference policy"):
        if args.process_index == 0:
            policy.save_pretrained(folder)
    policy.config._name_or_path = folder
