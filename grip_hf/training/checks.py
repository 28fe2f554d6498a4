"""Checks of numbers that neither transformers nor TRL looks at before it is too late."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from ..errors import ConfigError

POSITIVE = ("learning_rate", "temperature")
NOT_NEGATIVE = ("beta", "entropy_coef")


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


def check_whole(args: TrainingArguments) -> None:
    """Raise `ConfigError` if the processes of a launch would share out the weights of the scorer that they train.

    Rollouts call the scorer outside of the training step, where no process would have all of it.
    """
    if args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP") or is_deepspeed_zero3_enabled():
        raise ConfigError(
            "a scorer has a few MB and is trained as a whole copy in each process: launch with DDP or DeepSpeed "
            "ZeRO 1 or 2, not with FSDP or ZeRO 3 (device_map shares out a frozen model too large for one device)"
        )
