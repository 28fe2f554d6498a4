"""From a scorer to one with a tower scorer beside it: warm-up, then GRPO, each stage resumable."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import set_seed

from ..config import GripConfig
from ..errors import ConfigError
from ..files import make_folder
from ..frozen.data import Examples
from ..frozen.vlm import FrozenVLM
from ..hub.resolve import describe_base
from ..scorer.model import GripScorer
from ..tower.facts import width_of
from ..tower.layout import RowsTap
from ..tower.part import FOLDER
from ..tower.scorer import TowerScorer, TowerScorerConfig
from .checkpoints import last_checkpoint, save_scorer, saving
from .grpo import make_grpo_trainer
from .plan import TrainingPlan, keep_plan
from .tower import TowerStore, TowerWarmupTrainer

logger = logging.getLogger(__name__)


def train_tower(
    plan: TrainingPlan,
    model: Any,
    processor: Any,
    examples: Examples,
    scorer: GripScorer,
    depth: float | None = None,
    tower_keep_ratio: float = 0.5,
    say: Callable[[str], object] = logger.info,
) -> TowerScorer:
    """Run a plan, going on from whatever its output folder holds of it.

    Args:
        plan: What to do; `budgets` are shares of the tower's rows, `keep_ratio` is what the scorer keeps of all visual
            tokens meanwhile, and `method` is "grpo" or "warmup".
        model: The model.
        processor: Its processor.
        examples: What to learn from.
        scorer: Teaches, and chooses among the visual tokens whose rows are left.
        depth: After how many layers of the tower rows leave, or which share of them.
        tower_keep_ratio: The share that the settings are saved with.
        say: Told where the run goes on.

    Returns:
        The tower scorer. The output folder holds it beside the scorer, as `apply_grip` takes them.

    Raises:
        CheckpointError: The folder holds another run.
        ConfigError: The plan's method is another one, or it keeps more visual tokens than rows.
        FileError: The folder takes no files.
        UnsupportedModelError: The tower is not known.
    """
    if plan.method not in ("grpo", "warmup"):
        raise ConfigError(f"a tower scorer is trained by grpo or warmup alone, got method={plan.method!r}")
    config = GripConfig(plan.keep_ratio, selector="grip", tower_keep_ratio=tower_keep_ratio, tower_depth=depth)
    make_folder(plan.output)
    tap = RowsTap(depth)
    vlm = FrozenVLM(model, processor, tap=tap)
    try:
        width, base = width_of(tap.tower), describe_base(vlm.parts.owner)
        facts = {**plan.facts(), "model": {**base, "hidden_size": width}, "questions": len(examples), "depth": depth}
        keep_plan(plan.output, facts)
        set_seed(plan.seed)
        sizes = {"hidden_size": width, "text_size": vlm.hidden_size, "depth": tap.tower.first, **plan.scorer}
        learner = TowerScorer(TowerScorerConfig(base_model=base, **sizes))
        nn.Module.to(learner, vlm.device)
        store = TowerStore(vlm, examples, scorer, plan.keep_ratio, depth)
        for name, args in plan.stages().items():
            done = plan.output / name / "scorer"
            if (done / "model.safetensors").is_file():
                learner = TowerScorer.from_folder(done).train()
                nn.Module.to(learner, vlm.device)
                continue
            _stage(plan, name, args, learner, store, width, say)
    finally:
        vlm.close()
    save_scorer(scorer, plan.output, config)
    save_scorer(learner, plan.output / FOLDER)
    return learner.eval()


def _stage(
    plan: TrainingPlan, name: str, args: Any, learner: TowerScorer, store: TowerStore, width: int, say: Any
) -> None:
    """Train in place through one stage, from its last checkpoint if there is one."""
    folder: Path = plan.output / name
    checkpoint = last_checkpoint(folder, width)
    if checkpoint is not None:
        say(f"{name}: resuming from step {Path(checkpoint).name.partition('-')[2]}")
    make: Any = TowerWarmupTrainer if name == "warmup" else make_grpo_trainer
    trainer = make(learner, store, args, budgets=plan.budgets, **(plan.options if name == plan.method else {}))
    with saving(folder):
        trainer.train(resume_from_checkpoint=checkpoint)
    save_scorer(learner, folder / "scorer")
    (folder / "README.md").unlink(missing_ok=True)  # TRL's card, of a policy that nobody loads
