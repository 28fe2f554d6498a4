"""What warm-up and relaxation share: `transformers.Trainer` over rows of a sample store."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from ..config import count_kept
from ..errors import ConfigError
from ..frozen.store import SampleStore
from ..scorer.model import GripScorer
from .checks import check_copies, check_settings
from .rollout import BudgetRange

DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 32,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "max_grad_norm": 1.0,
    "logging_steps": 10,
    "report_to": "none",
    "ddp_find_unused_parameters": False,  # every weight of a scorer is used in every step
}


def training_arguments(output_dir: str, **overrides: Any) -> TrainingArguments:
    """`TrainingArguments` with defaults that suit a small scorer.

    Raises:
        ConfigError: A setting makes no sense, or transformers refuses it.
    """
    check_settings(overrides)
    try:
        return TrainingArguments(output_dir=output_dir, **{**DEFAULTS, **overrides, "remove_unused_columns": False})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"training cannot be set up like this: {error}") from error


class Rows(Dataset):
    """The row numbers of a store; the samples themselves are looked up when they are needed."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.length

    def __getitem__(self, row: int) -> int:
        """Return the row number."""
        return row


class StoreTrainer(Trainer):
    """Trains a scorer on rows of a store; subclasses say by which loss.

    Args:
        scorer: The scorer, trained in place.
        store: The examples.
        args: From `training_arguments`.
        budgets: Keep ratios to draw from, one per example and step.
        **kwargs: Further arguments of `Trainer`.

    Raises:
        ConfigError: The launch would share out the scorer.
    """

    def __init__(
        self,
        scorer: GripScorer,
        store: SampleStore,
        args: TrainingArguments,
        budgets: BudgetRange | tuple[float, float] = BudgetRange(),  # noqa: B008  (frozen)
        **kwargs: Any,
    ) -> None:
        check_copies(args)
        self.store = store
        self.budgets = budgets if isinstance(budgets, BudgetRange) else BudgetRange(*budgets)
        self.reports: dict[str, list[float]] = {}
        rows = Rows(len(store.examples))
        super().__init__(
            model=scorer, args=args, train_dataset=rows, data_collator=lambda rows: {"rows": rows}, **kwargs
        )

    @abstractmethod
    def loss(self, scorer: nn.Module, rows: list[int]) -> Tensor:
        """The loss of a batch of rows, a scalar."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """What `Trainer` calls."""
        loss = self.loss(model, inputs["rows"])
        return (loss, {}) if return_outputs else loss

    def draw_budgets(self, rows: list[int]) -> Tensor:
        """[B] long: a budget for each row, the same whenever the same step is run again."""
        moment = f"{self.args.seed}/{self.state.global_step}"
        ratios = [self.budgets.draw(f"{moment}/{row}/{i}") for i, row in enumerate(rows)]
        samples = self.store.samples(rows)
        return torch.tensor([count_kept(s.num_visual, r) for s, r in zip(samples, ratios, strict=True)])

    def report(self, **values: float) -> None:
        """Add figures to the Trainer's next log entry."""
        for name, value in values.items():
            self.reports.setdefault(name, []).append(float(value))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the means of what was reported since the last entry."""
        logs = {**logs, **{name: sum(values) / len(values) for name, values in self.reports.items()}}
        self.reports.clear()
        super().log(logs, start_time)
