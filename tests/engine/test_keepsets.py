"""selection.py against brute force over all ordered lists."""

import itertools
import math

import pytest
import torch

from grip_hf.engine.keepsets import entropy, gumbel_topk, log_prob, topk_mask
from grip_hf.errors import NonFiniteScoreError


def picks_one_by_one(scores, picks):
    """Plain-python log-prob and entropy of each pick."""
    left, logs, entropies = set(range(len(scores))), [], []
    for pick in picks:
        total = sum(math.exp(scores[i]) for i in left)
        probs = {i: math.exp(scores[i]) / total for i in left}
        logs.append(math.log(probs[pick]))
        entropies.append(-sum(p * math.log(p) for p in probs.values()))
        left.remove(pick)
    return logs, entropies


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


def test_log_probs_and_entropies_of_all_ordered_lists():
    values = [0.3, -1.2, 2.0, 0.7, -0.4]
    for length in range(1, 6):
        lists = list(itertools.permutations(range(5), length))
        order = torch.tensor(lists)
        # one padding token with a huge score must change nothing
        scores = torch.tensor([[*values, 50.0]]).expand(len(lists), 6)
        mask = torch.tensor([[True] * 5 + [False]]).expand(len(lists), 6)
        logs, ents = log_prob(scores, mask, order), entropy(scores, mask, order)
        expected = [picks_one_by_one(values, picks) for picks in lists]
        torch.testing.assert_close(logs, torch.tensor([e[0] for e in expected]), atol=1e-5, rtol=0)
        torch.testing.assert_close(ents, torch.tensor([e[1] for e in expected]), atol=1e-5, rtol=0)
        assert logs.sum(1).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_padded_picks_count_nothing_and_give_finite_gradients():
    scores = torch.tensor([[0.1, 0.2, 0.3], [1.0, 2.0, 3.0]], requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    order = torch.tensor([[2, 0, 1], [0, -1, -1]])
    logs, ents = log_prob(scores, mask, order), entropy(scores, mask, order)
    assert logs[1].tolist() == [0, 0, 0] and ents[1].tolist() == [0, 0, 0]
    (logs.sum() + ents.sum()).backward()
    assert torch.isfinite(scores.grad).all() and scores.grad[1].tolist() == [0, 0, 0]


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
        expected = math.exp(sum(picks_one_by_one([v / 0.5 for v in values], picks)[0]))
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
