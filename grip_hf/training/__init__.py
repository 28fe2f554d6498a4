"""Learn which visual tokens to keep: warm-up, GRPO on TRL's trainer, and the relaxation it is compared with.

Names are loaded when they are first used, because the trainers bring TRL and datasets with them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..frozen.data import DatasetExamples, Example
    from ..frozen.sources import load_model, load_rows
    from ..frozen.store import SampleStore
    from ..frozen.vlm import FrozenVLM
    from ..scorer.model import GripScorer, GripScorerConfig
    from .checkpoints import last_checkpoint, save_scorer
    from .grpo import GRPO_DEFAULTS, GRPO_FIXED, grpo_config, make_grpo_trainer
    from .pipeline import TrainingPlan, train_scorer
    from .reference import PruneReference, prune_like
    from .relaxed import RelaxedTrainer
    from .rewards import closeness, correctness, ladder, likelihood
    from .rollout import BudgetRange
    from .supervised import training_arguments
    from .warmup import WarmupTrainer

_HOMES = {
    "BudgetRange": ".rollout",
    "DatasetExamples": "..frozen.data",
    "Example": "..frozen.data",
    "FrozenVLM": "..frozen.vlm",
    "GRPO_DEFAULTS": ".grpo",
    "GRPO_FIXED": ".grpo",
    "GripScorer": "..scorer.model",
    "GripScorerConfig": "..scorer.model",
    "PruneReference": ".reference",
    "RelaxedTrainer": ".relaxed",
    "SampleStore": "..frozen.store",
    "TrainingPlan": ".pipeline",
    "WarmupTrainer": ".warmup",
    "closeness": ".rewards",
    "correctness": ".rewards",
    "grpo_config": ".grpo",
    "last_checkpoint": ".checkpoints",
    "ladder": ".rewards",
    "likelihood": ".rewards",
    "load_model": "..frozen.sources",
    "load_rows": "..frozen.sources",
    "make_grpo_trainer": ".grpo",
    "prune_like": ".reference",
    "save_scorer": ".checkpoints",
    "train_scorer": ".pipeline",
    "training_arguments": ".supervised",
}
__all__ = [
    "GRPO_DEFAULTS",
    "GRPO_FIXED",
    "BudgetRange",
    "DatasetExamples",
    "Example",
    "FrozenVLM",
    "GripScorer",
    "GripScorerConfig",
    "PruneReference",
    "RelaxedTrainer",
    "SampleStore",
    "TrainingPlan",
    "WarmupTrainer",
    "closeness",
    "correctness",
    "grpo_config",
    "ladder",
    "last_checkpoint",
    "likelihood",
    "load_model",
    "load_rows",
    "make_grpo_trainer",
    "prune_like",
    "save_scorer",
    "train_scorer",
    "training_arguments",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
