"""The baseline that GRPO is compared with: a continuous relaxation of top-k, trained by straight-through gradients.

Forward, exactly the best tokens of Gumbel-perturbed scores are seen; backward, the gradient passes through a soft
top-k (or, if asked for, that is what is seen forward too: the noise is then on the scores alone). The loss is GRPO's
rewards in a differentiable form: KL(full || pruned) on the answer's positions minus the probability of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.keepsets import topk_mask
from ..frozen.samples import Sample, answer_ids
from ..frozen.store import compare
from ..frozen.vlm import FrozenVLM
from .checks import check_settings
from .policy import score_groups
from .supervised import StoreTrainer

# Weight of a token that is not kept: small enough to vanish, large enough for float32 gradients.
UNSEEN = 1e-9


def soft_topk(scores: Tensor, mask: Tensor, budgets: Tensor, temperature: float, rounds: int = 30) -> Tensor:
    """Inclusion weights in (0, 1) that sum to the budget: sigmoid((scores - threshold) / temperature).

    The threshold is found by bisection; its gradient is the exact one of the constraint.

    Args:
        scores: [G, N] float.
        mask: [G, N] bool, True at real tokens.
        budgets: [G] long.
        temperature: > 0.
        rounds: Steps of bisection.

    Returns:
        [G, N], 0 at padding.
    """
    with torch.no_grad():
        low = scores.masked_fill(~mask, torch.inf).amin(1) - 20 * temperature
        high = scores.masked_fill(~mask, -torch.inf).amax(1) + 20 * temperature
        for _ in range(rounds):
            middle = (low + high) / 2
            total = torch.sigmoid((scores - middle[:, None]) / temperature).masked_fill(~mask, 0).sum(1)
            low, high = torch.where(total > budgets, middle, low), torch.where(total > budgets, high, middle)
        slope = torch.sigmoid((scores - middle[:, None]) / temperature)
        slope = (slope * (1 - slope)).masked_fill(~mask, 0)
        share = slope / slope.sum(1, keepdim=True).clamp(min=1e-12)
    # The sum stays at the budget, so the threshold moves by the share-weighted mean of the scores' moves.
    moved = (share * scores).sum(1, keepdim=True)
    threshold = middle[:, None] + moved - moved.detach()
    return torch.sigmoid((scores - threshold) / temperature).masked_fill(~mask, 0)


def straight_through(
    scores: Tensor, mask: Tensor, budgets: Tensor, temperature: float, noise: float = 1.0, soft_gates: bool = False
) -> Tensor:
    """[G, N] gates: 1 at the best tokens of `scores` plus Gumbel noise, else 0, with the gradient of `soft_topk`.

    With `soft_gates` the gates are the weights of `soft_topk` themselves.
    """
    gumbel = -torch.empty_like(scores).exponential_().log()
    noisy = scores + noise * gumbel
    soft = soft_topk(noisy, mask, budgets, temperature)
    if soft_gates:
        return soft
    hard = topk_mask(noisy.detach(), mask, budgets).float()
    return hard + soft - soft.detach()


def gated_mask(attention_mask: Tensor, visual: Tensor, gates: Tensor, real: Tensor, dtype: torch.dtype) -> Tensor:
    """A causal attention mask in which a visual token counts as much as its gate says.

    Args:
        attention_mask: [B, L], 0 at padding.
        visual: [B, L] bool.
        gates: [B, N], one per visual token in order.
        real: [B, N] bool, False at the padding of `gates`.
        dtype: Of the result.

    Returns:
        [B, 1, L, L] to be added to attention logits.
    """
    length = visual.shape[1]
    weight = gates.new_ones(visual.shape).masked_scatter(visual, gates[real])
    causal = torch.ones(length, length, dtype=torch.bool, device=visual.device).tril()
    # A row of padding sees itself, so that no softmax is over nothing.
    seen = (causal & (attention_mask != 0)[:, None]) | torch.eye(length, dtype=torch.bool, device=visual.device)
    # Rounding may leave a little less than 0. Outside the gradient, which `clamp` gives none at 0 since torch 2.14.
    weight = weight + (weight.clamp(min=0) - weight).detach()
    return (weight + UNSEEN).log()[:, None].masked_fill(~seen, torch.finfo(dtype).min)[:, None].to(dtype)


def gated_logits(vlm: FrozenVLM, samples: Sequence[Sample], gates: Tensor, real: Tensor) -> Tensor:
    """[B, A, V] logits at the answers' positions of a frozen model that sees each visual token as its gate says.

    Args:
        vlm: The model.
        samples: What it is asked.
        gates: [B, N], one per visual token in order.
        real: [B, N] bool, False at the padding of `gates`.
    """

    def choose(inputs: dict[str, Tensor]) -> Tensor:
        visual = vlm.visual_mask(inputs["input_ids"])
        return gated_mask(inputs["attention_mask"], visual, gates, real, vlm.model.dtype)

    logits: Tensor = vlm.run(samples, attention_mask=choose).logits
    return logits


class RelaxedTrainer(StoreTrainer):
    """Trains a scorer through a relaxed choice.

    Args:
        *args: See `StoreTrainer`.
        temperature: Of the soft top-k.
        final_temperature: What it falls (or rises) to, by the same factor each step; None to stay.
        soft_gates: Whether the model sees soft choices in training, instead of hard ones.
        draws: Choices drawn per example and step.
        **kwargs: See `StoreTrainer`.

    Raises:
        ConfigError: A temperature is not a positive number.
    """

    def __init__(
        self,
        *args: Any,
        temperature: float = 1.0,
        final_temperature: float | None = None,
        soft_gates: bool = False,
        draws: int = 1,
        **kwargs: Any,
    ) -> None:
        final_temperature = temperature if final_temperature is None else final_temperature
        check_settings({"temperature": temperature, "final_temperature": final_temperature})
        super().__init__(*args, **kwargs)
        self.temperatures, self.soft_gates, self.draws = (temperature, final_temperature), soft_gates, draws

    @property
    def temperature(self) -> float:
        """That of the step at hand."""
        first, last = self.temperatures
        return float(first * (last / first) ** (self.state.global_step / max(1, self.state.max_steps)))

    def loss(self, scorer: nn.Module, rows: list[int]) -> Tensor:
        """KL and answer probability of a batch of rows under relaxed keep-sets."""
        batch = self.store.visual(rows, self.draw_budgets(rows))
        scores = score_groups(scorer, batch)
        samples = self.store.samples(rows) * self.draws
        repeat = {"scores": scores, "mask": batch.mask, "budgets": batch.budgets}
        scores, mask, budgets = (value.repeat(self.draws, *[1] * (value.ndim - 1)) for value in repeat.values())
        gates = straight_through(scores, mask, budgets, self.temperature, soft_gates=self.soft_gates)
        vlm = self.store.vlm
        logs = gated_logits(vlm, samples, gates, mask).float().log_softmax(-1)
        verdict = compare(vlm.full_log_probs(samples), logs, *answer_ids(samples))
        probability = verdict.log_prob.exp()
        self.report(kl=verdict.kl.mean().item(), correct=verdict.correct.float().mean().item())
        return (verdict.kl - probability).mean()
