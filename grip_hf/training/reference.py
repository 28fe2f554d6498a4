"""The reference model of a TRL trainer, pruned like the policy.

A trainer with a `ref_model` (DPO, KTO, GRPO, RLOO) makes it anew from the policy's checkpoint, without the patch: the
policy is then compared with a model that sees other tokens. Of an adapted policy there is no second model (its
reference is the same model with the adapters off), and nothing is to be done.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import ConfigError
from ..families.table import unwrap
from ..handle import GripHandle
from ..patch import apply_grip, remove_grip

__all__ = ["PruneReference", "prune_like"]


def prune_like(reference: nn.Module, model: nn.Module) -> None:
    """Prune one model like another, so that both keep the same tokens of the same call.

    What is said later of `model` by `model.grip.budget(...)`, `disabled()` and `prompt(...)` counts for both.

    Args:
        reference: The model to patch, of the same architecture; a patch that it has is replaced.
        model: The patched model.

    Raises:
        ConfigError: `model` is not patched.
    """
    handle = vars(unwrap(model)).get("grip")
    if not isinstance(handle, GripHandle):
        raise ConfigError(f"model must be patched by apply_grip, got a {type(unwrap(model)).__name__} that is not")
    rows: Any = {"tower_selector": handle.tower.chosen_by}
    if handle.can_be_saved:
        apply_grip(reference, handle.config, scorer=handle.scorer, **rows)  # type: ignore[arg-type]
    else:
        # A copy, because a selector may remember modules of the model that it was prepared for.
        apply_grip(reference, handle.config, selector=copy.copy(handle.selector), **rows)
    unwrap(reference).grip.follow(handle)


class PruneReference(TrainerCallback):
    """Keeps a trainer's reference model pruned like the policy.

        trainer = trl.DPOTrainer(model, ...)
        trainer.add_callback(PruneReference(trainer))

    The reference is patched at once, and again whenever a step begins with another patch on the policy. A trainer
    without a reference model is left alone.

    Args:
        trainer: A trainer whose reference model, if any, is its attribute `ref_model`; its policy is patched.

    Raises:
        ConfigError: The policy is not patched.
        UnsupportedModelError: The reference model cannot be pruned.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.followed: GripHandle | None = None
        self._follow(trainer.model)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Follow the policy, should its patch be another one by now."""
        self._follow(kwargs["model"])

    def _follow(self, policy: nn.Module) -> None:
        reference = getattr(self.trainer, "ref_model", None)
        if reference is None:
            return
        policy, reference = (self._bare(one) for one in (policy, reference))
        handle = vars(policy).get("grip")
        if handle is None and self.followed is not None:
            remove_grip(reference)
        elif handle is None or handle is not self.followed or "grip" not in vars(reference):
            prune_like(reference, policy)
        self.followed = handle

    def _bare(self, model: nn.Module) -> Any:
        """The transformers model without what accelerate and PEFT put around it."""
        return unwrap(self.trainer.accelerator.unwrap_model(model, keep_torch_compile=False))
