"""keepsets.py against brute force over all ordered lists."""

import itertools
import math

import pytest
import torch
from plackett_luce import log_prob

from grip_hf.engine.keepsets import topk_mask
from grip_hf.errors import NonFiniteScoreError
from grip_hf.training.rollout import gumbel_topk


def test_topk_mask_keeps_the_best_real_tokens():
    scores = torch.tensor([[1.0, 5.0, 3.0, 9.0], [1.0, 1.0, 1.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
    mask = torch.tensor([[True, True, True, False], [True] * 4, [False] * 4])
    keep = topk_mask(scores, mask, torch.tensor([2, 3, 2]))
    assert keep.tolist() == [[False, True, True, False], [True, True, True, False], [False] * 4]


def test_topk_mask_counts_with_padding_of_any_value():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        scores = torch.randint(-2, 3, (4, 7), generator=generator).float()
        mask = torch.rand(4, 7, generator=generator) < 0.6
        budgets = torch.randint(0, 9, (4,), generator=generator)
        keep = topk_mask(scores.masked_fill(~mask, float("nan")), mask, budgets)
        for g in range(4):
            real = [i for i in range(7) if mask[g, i]]
            best = sorted(real, key=lambda i: (-scores[g, i].item(), i))[: int(budgets[g])]
            assert keep[g].nonzero().flatten().tolist() == sorted(best)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_scores_are_refused_only_at_real_tokens(value):
    scores = torch.tensor([[0.0, value]])
    with pytest.raises(NonFiniteScoreError, match="token 1 of group 0"):
        topk_mask(scores, torch.tensor([[True, True]]), torch.tensor([1]))
    with pytest.raises(NonFiniteScoreError):
        gumbel_topk(scores, torch.tensor([[True, True]]), torch.tensor([1]))
    assert topk_mask(scores, torch.tensor([[True, False]]), torch.tensor([2])).tolist() == [[True, False]]


def test_gumbel_topk_draws_plackett_luce():
    values = [0.5, -0.5, 1.0]
    draws = 20_000
    order = gumbel_topk(
        torch.tensor([[*values, 9.0]]).expand(draws, 4),
        torch.tensor([[True, True, True, False]]).expand(draws, 4),
        torch.full((draws,), 2),
        torch.Generator().manual_seed(0),
        temperature=0.5,
    )
    for picks in itertools.permutations(range(3), 2):
        every = torch.tensor([values]) / 0.5
        expected = float(log_prob(every, torch.ones_like(every).bool(), torch.tensor([picks])).sum().exp())
        share = (order == torch.tensor(picks)).all(1).float().mean().item()
        assert share == pytest.approx(expected, abs=4 * math.sqrt(expected / draws))


def test_gumbel_topk_shapes_seed_and_padding():
    scores, mask = torch.zeros(2, 4), torch.tensor([[True] * 4, [True, False, False, False]])
    budgets = torch.tensor([3, 3])
    order = gumbel_topk(scores, mask, budgets, torch.Generator().manual_seed(1))
    assert order.shape == (2, 3) and sorted(order[0].tolist()) != [-1, -1, -1] and order[1].tolist() == [0, -1, -1]
    assert torch.equal(order, gumbel_topk(scores, mask, budgets, torch.Generator().manual_seed(1)))
    assert gumbel_topk(scores, mask, torch.zeros(2, dtype=torch.long)).shape == (2, 0)
    with pytest.raises(ValueError, match="temperature"):
        gumbel_topk(scores, mask, budgets, temperature=0)
