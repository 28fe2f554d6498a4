"""From nothing to a trained scorer: warm-up, then GRPO or its relaxation, each stage resumable."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn
from transformers import set_seed

from ..config import GripConfig
from ..errors import ConfigError, GripError
from ..files import make_folder
from ..frozen.store import SampleStore
from ..hub.adapter_part import fingerprint
from ..hub.resolve import describe_base
from ..scorer.model import GripScorer
from .checkpoints import last_checkpoint, save_scorer, saving
from .first import first_scorer
from .grpo import make_grpo_trainer
from .plan import TrainingPlan, keep_plan
from .relaxed import RelaxedTrainer
from .warmup import WarmupTrainer

logger = logging.getLogger(__name__)
Say = Callable[[str], object]


def train_scorer(
    plan: TrainingPlan, store: SampleStore, callbacks: list[Any] | None = None, say: Say = logger.info
) -> GripScorer:
    """Run a plan, going on from whatever its output folder holds of it.

    Args:
        plan: What to do.
        store: What to learn from.
        callbacks: For each stage's trainer.
        say: Told, on the main process, where the run goes on.

    Returns:
        The trained scorer, which is also in `plan.output`.

    Raises:
        CheckpointError: The folder holds another run.
        ConfigError: transformers or TRL refuses a setting.
        FileError: The folder takes no files, or the disk is full; the last good checkpoint is kept.
    """
    make_folder(plan.output)
    stages, base = plan.stages(), describe_base(store.vlm.parts.owner)
    state, width = PartialState(), store.vlm.hidden_size
    set_seed(plan.seed)
    scorer = first_scorer(plan.start, plan.scorer, width, base, store.vlm.parts)
    with state.main_process_first():
        facts = {**plan.facts(), "model": {**base, "hidden_size": width}, "questions": len(store.examples)}
        facts |= {} if plan.start is None else {"start": f"{plan.start} ({fingerprint(scorer.state_dict())})"}
        keep_plan(plan.output, facts, write=state.is_main_process)
    nn.Module.to(scorer, store.vlm.device)
    todo = [name for name in stages if not finished(plan.output / name)]
    if not todo and stages:
        _on_main(say, f"{plan.output}: finished, nothing to do")
    for name, args in stages.items():
        if finished(plan.output / name):
            scorer = GripScorer.from_pretrained(plan.output / name / "scorer")
            nn.Module.to(scorer, store.vlm.device)
        else:
            _stage(plan, name, args, scorer, store, callbacks, say)
    if state.is_main_process:
        save_scorer(scorer, plan.output, GripConfig(keep_ratio=plan.keep_ratio))
    state.wait_for_everyone()
    return scorer.eval()


def finished(folder: Path) -> bool:
    """Whether a stage has left its scorer."""
    return (folder / "scorer" / "model.safetensors").is_file()


def _stage(
    plan: TrainingPlan,
    name: str,
    args: Any,
    scorer: GripScorer,
    store: SampleStore,
    callbacks: list[Any] | None,
    say: Say,
) -> None:
    """Train a scorer in place through one stage, from its last checkpoint if there is one."""
    folder = plan.output / name
    checkpoint = last_checkpoint(folder, store.vlm.hidden_size)
    if checkpoint is not None:
        _on_main(say, f"{name}: resuming from step {Path(checkpoint).name.partition('-')[2]}")
    try:
        trainer = _trainer(plan, name, args, scorer, store, callbacks)
    except GripError:
        raise
    except (ValueError, RuntimeError, ImportError, OSError) as error:  # a folder, or where metrics should go
        raise ConfigError(f"{name} cannot be set up like this: {error}") from error
    with saving(folder):
        trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.is_world_process_zero():
        save_scorer(scorer, folder / "scorer")
        (folder / "README.md").unlink(missing_ok=True)  # TRL's card, of a policy that nobody loads
    trainer.accelerator.wait_for_everyone()


def _on_main(say: Say, text: str) -> None:
    if PartialState().is_main_process:
        say(text)


def _trainer(
    plan: TrainingPlan, name: str, args: Any, scorer: GripScorer, store: SampleStore, callbacks: list[Any] | None
) -> Any:
    shared: dict[str, Any] = {"budgets": plan.budgets, "callbacks": callbacks}
    if name == "warmup":
        return WarmupTrainer(scorer, store, args, target=plan.target, share_weight=plan.share_weight, **shared)
    make: Any = RelaxedTrainer if name == "relaxed" else make_grpo_trainer
    return make(scorer, store, args, **shared, **plan.options)
