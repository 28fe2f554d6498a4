"""Checks of numbers that neither transformers nor TRL looks at before it is too late."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

from ..errors import ConfigError

POSITIVE = ("learning_rate", "temperature", "final_temperature")
NOT_NEGATIVE = ("beta", "entropy_coef", "share_weight")


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if a learning rate, a temperature or a loss weight among `settings` makes no sense."""
    for name in (*POSITIVE, *NOT_NEGATIVE):
        value, positive = settings.get(name, 1.0), name in POSITIVE
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or (positive and value == 0):
            wanted = "a positive number" if positive else "a number >= 0"
            raise ConfigError(f"{name} must be {wanted}, got {value!r}")
    for weight in settings.get("reward_weights") or ():
        if not math.isfinite(weight):
            raise ConfigError(f"reward_weights must be finite numbers, got {list(settings['reward_weights'])}")


def check_copies(args: TrainingArguments) -> None:
    """Raise `ConfigError` if the launch would share out the weights or the optimizer of the scorer that is trained.

    There is nothing to gain from it, and rollouts call the scorer outside of the training step, where no process would
    have all of it.
    """
    flags = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    if args.fsdp or args.deepspeed or any(map(parse_flag_from_env, flags)):
        raise ConfigError(
            "a scorer has a few MB and is trained as a whole copy in each process: launch with DDP, not with FSDP or "
            "DeepSpeed (device_map shares out a frozen model that is too large for one device)"
        )
