"""Draw keep-sets and find out how the model answers with them: the `rollout_func` of TRL's GRPOTrainer."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..engine.keepsets import check_finite
from ..errors import ConfigError
from ..frozen.store import SampleStore
from ..scorer.memory import Rated, pick_in_turn
from .policy import rate_groups

Rollout = Callable[[list[Any], Any], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class BudgetRange:
    """Keep ratios to train on, drawn log-uniformly: a token more matters the more the fewer there are.

    Args:
        low: Smallest ratio, in (0, 1].
        high: Largest ratio, in [low, 1].

    Raises:
        ConfigError: They are not.
    """

    low: float = 0.03
    high: float = 0.6

    def __post_init__(self) -> None:
        numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (self.low, self.high))
        if not numbers or not 0 < self.low <= self.high <= 1:
            raise ConfigError(
                f"budgets must be (low, high) with 0 < low <= high <= 1, got {self.low!r}, {self.high!r}"
            )

    def draw(self, key: str) -> float:
        """The ratio that belongs to a key: the same on every process."""
        return math.exp(random.Random(key).uniform(math.log(self.low), math.log(self.high)))


def make_rollout(store: SampleStore, budgets: BudgetRange, greedy: bool = False) -> Rollout:
    """Make a `rollout_func`.

    Args:
        store: Where the rows that prompts name are looked up.
        budgets: What budgets are drawn from: one per group, the same on every process.
        greedy: Whether the first member of each group keeps the best tokens instead of drawn ones. It counts for the
            group's baseline, not for the gradient.
    """

    @torch.no_grad()
    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        accelerator, training = trainer.accelerator, trainer.model.training
        policy = accelerator.unwrap_model(trainer.model)
        size = trainer.num_generations if training else trainer.num_generations_eval
        first = accelerator.process_index * len(prompts)
        rows = [prompt[-1]["row"] for prompt in prompts]
        groups = [(first + i) // size for i in range(len(rows))]
        moment = f"{trainer.args.seed}/{trainer.state.global_step}"
        ratios = [budgets.draw(f"{moment}/{group}/{row}") for group, row in zip(groups, rows, strict=True)]
        counts = [store.count(row, ratio) for row, ratio in zip(rows, ratios, strict=True)]
        lead = [greedy and training and (first + i) % size == 0 for i in range(len(rows))]
        picks = _pick(policy, store, rows, counts, lead, trainer.temperature if training else None)
        samples = store.samples(rows)
        keep = [
            torch.zeros(s.num_visual, dtype=torch.bool).index_fill_(0, p, True)
            for s, p in zip(samples, picks, strict=True)
        ]
        verdict = store.judge(samples, keep)
        decode = store.vlm.processor.tokenizer.decode
        columns = samples[0].example.columns
        result: dict[str, Any] = {name: [sample.example.columns.get(name) for sample in samples] for name in columns}
        result |= {
            "answer": [sample.example.answer for sample in samples],
            "prompt_ids": [[row] for row in rows],
            "completion_ids": [p.tolist() for p in picks],
            "logprobs": None,
            "budget": counts,
            "keep_ratio": ratios,
            "kl": verdict.kl.tolist(),
            "correct": verdict.correct.tolist(),
            "log_prob": verdict.log_prob.tolist(),
            "confidence": verdict.confidence.tolist(),
            "predicted": [decode(ids[ids >= 0], skip_special_tokens=True) for ids in verdict.predicted],
        }
        if greedy:
            result["env_mask"] = [[0 if leads else 1] * count for leads, count in zip(lead, counts, strict=True)]
        return result

    return rollout


def _pick(
    policy: Any, store: SampleStore, rows: list[int], counts: list[int], lead: list[bool], temperature: float | None
) -> list[Tensor]:
    """Per row the picks [K] long, on the CPU: drawn at `temperature`, or the best ones for leaders and for None."""
    asked = torch.tensor([rows, counts]).T
    distinct, group = asked.unique(dim=0, return_inverse=True)
    batch = store.visual(distinct[:, 0].tolist(), distinct[:, 1])
    rated, mask = rate_groups(policy.scorer, batch).rows(group), batch.mask[group]
    wanted = torch.tensor(counts, device=mask.device)
    if rated.take is None:
        order = gumbel_topk(rated.scores, mask, wanted, temperature=temperature or 1.0)
        best = rated.scores.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
        best = best[:, : order.shape[1]]
    else:
        order = draw_in_turn(rated, mask, wanted, temperature or 1.0)
        best, _ = pick_in_turn(rated, mask, wanted)
    greedy = torch.tensor(lead, device=mask.device) | (temperature is None)
    order = torch.where(greedy[:, None], best, order).cpu()
    return [picks[:count] for picks, count in zip(order, counts, strict=True)]


def draw_in_turn(rated: Rated, mask: Tensor, budgets: Tensor, temperature: float) -> Tensor:
    """Draw ordered picks as `gumbel_topk` does, with noise anew for each pick, since each changes the next scores."""
    check_finite(rated.scores, mask)
    width = int(torch.minimum(budgets, mask.sum(1)).max())
    noise = torch.empty(len(mask), width, mask.shape[1], dtype=torch.float64, device=mask.device).exponential_()
    return pick_in_turn(rated, mask, budgets, -temperature * noise.log())[0]


def gumbel_topk(
    scores: Tensor,
    mask: Tensor,
    budgets: Tensor,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Draw ordered picks without replacement from the Plackett-Luce distribution over `scores / temperature`.

    Returns:
        [G, Kmax] long with Kmax = the largest number of picks; -1 where a group has fewer.

    Raises:
        NonFiniteScoreError: A real token has a NaN or infinite score.
        ValueError: `temperature` is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature!r}")
    check_finite(scores, mask)
    # Double precision: a float32 uniform can be 0 and has visible ties at large N.
    noise = torch.empty(scores.shape, dtype=torch.float64, device=scores.device).exponential_(generator=generator)
    keys = scores.double() / temperature - noise.log()
    ranked = keys.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    wanted = torch.minimum(budgets.clamp(min=0), mask.sum(1))
    width = int(wanted.max()) if wanted.numel() else 0
    chosen = torch.arange(width, device=scores.device) < wanted[:, None]
    return ranked[:, :width].masked_fill(~chosen, -1)
