"""A scorer whose scores change while it picks, held against a loop over picks with plain numbers."""

import itertools

import pytest
import torch
from classroom import TOKENS, make_scorer, make_store
from versions import TRAINING

from grip_hf.engine.keepsets import topk_mask
from grip_hf.errors import ConfigError, ScorerError
from grip_hf.scorer.memory import Rated, as_scores, pick_in_turn, scores_before_picks
from grip_hf.scorer.model import GripScorer, GripScorerConfig
from grip_hf.selectors.grip import GripSelector
from grip_hf.training.grpo import grpo_config, make_grpo_trainer
from grip_hf.training.plan import TrainingPlan
from grip_hf.training.policy import PruningPolicy, rate_groups
from grip_hf.training.rollout import draw_in_turn


def rated(groups=2, tokens=5, size=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    give, take = (torch.randn(groups, tokens, size, generator=draw) for _ in range(2))
    return Rated(torch.randn(groups, tokens, generator=draw), give, take)


def score_of(one, row, token, kept):
    """The score of a token after some were kept, number by number."""
    value = float(one.scores[row, token])
    for other in kept:
        shared = zip(one.give[row, other].tolist(), one.take[row, token].tolist(), strict=True)
        value += sum(give * take for give, take in shared) / len(kept)
    return value


def chance(one, row, tokens, order):
    """The chance of a list of picks: a softmax over what is left, pick by pick."""
    left, kept, product = list(tokens), [], 1.0
    for pick in order:
        weights = {token: torch.tensor(score_of(one, row, token, kept)).exp() for token in left}
        product *= float(weights[pick] / sum(weights.values()))
        left.remove(pick)
        kept.append(pick)
    return product


def make_remembering(seed=0):
    """A small scorer that takes much from its memory."""
    scorer = make_scorer(seed, memory_width=4)
    with torch.no_grad():
        scorer.memory.take.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return scorer


def test_scores_before_each_pick_follow_what_is_kept():
    one, picks = rated(), torch.tensor([[3, 0, 4], [1, 2, 0]])
    found = scores_before_picks(one, picks)
    for row, step, token in itertools.product(range(2), range(3), range(5)):
        assert float(found[row, step, token]) == pytest.approx(score_of(one, row, token, picks[row, :step]), abs=1e-5)


def test_the_best_is_picked_again_and_again():
    one, mask, budgets = rated(seed=1), torch.ones(2, 5).bool(), torch.tensor([4, 2])
    mask[1, 3:] = False
    picks, after = pick_in_turn(one, mask, budgets)
    for row in range(2):
        left, kept = mask[row].nonzero().flatten().tolist(), []
        for _ in range(int(budgets[row])):
            kept.append(max(left, key=lambda token: score_of(one, row, token, kept)))
            left.remove(kept[-1])
        assert [pick for pick in picks[row].tolist() if pick >= 0] == kept
        assert [float(after[row, token]) for token in left] == pytest.approx(
            [score_of(one, row, token, kept) for token in left], abs=1e-5
        )
    scores = as_scores(picks, after, mask)
    assert [row.nonzero().flatten().tolist() for row in topk_mask(scores, mask, budgets)] == [
        sorted(pick for pick in row if pick >= 0) for row in picks.tolist()
    ]
    assert (scores[1, 3:] == 0).all()


def test_picks_are_drawn_with_their_chances():
    one, count, draws = rated(groups=1, tokens=4, seed=2), 2, 40_000
    torch.manual_seed(0)
    many = one.rows(torch.zeros(draws, dtype=torch.long))
    picks = draw_in_turn(many, torch.ones(draws, 4).bool(), torch.full((draws,), count), 1.0)
    for order in itertools.permutations(range(4), count):
        share = float((picks == torch.tensor(order)).all(1).float().mean())
        expected = chance(one, 0, range(4), order)
        assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / draws) ** 0.5)


@TRAINING
def test_the_policy_gives_trl_the_chances_of_the_picks():
    store, scorer = make_store(), make_remembering()
    policy = PruningPolicy.around(scorer, store, TOKENS)
    order = [5, 0, 11, 3]
    with torch.no_grad():
        ids = torch.tensor([[0, *order]])
        logs = policy(ids, torch.ones_like(ids)).logits[0, :-1].log_softmax(-1)
        one = rate_groups(scorer, store.visual([0], torch.tensor([len(order)])))
    exact = chance(one, 0, range(TOKENS), order)
    assert float(logs[range(4), order].sum().exp()) == pytest.approx(exact, rel=1e-4)


@TRAINING
def test_it_starts_as_the_scorer_without_memory_and_grpo_trains_it(tmp_path):
    store, plain, scorer = make_store(), make_scorer(), make_scorer(memory_width=4)
    scorer.load_state_dict(plain.state_dict(), strict=False)
    batch = store.visual([0, 1], torch.tensor([4, 7]))
    kept = [topk_mask(GripSelector(one)(batch), batch.mask, batch.budgets) for one in (plain, scorer)]
    assert torch.equal(*kept)
    config = grpo_config(
        str(tmp_path), max_steps=3, per_device_train_batch_size=8, num_generations=4, use_cpu=True, learning_rate=1e-2,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    before = {name: weight.clone() for name, weight in scorer.memory.named_parameters()}
    make_grpo_trainer(scorer, store, config).train()
    assert all(not torch.equal(weight, before[name]) for name, weight in scorer.memory.named_parameters())
    scorer.save_pretrained(tmp_path / "saved")
    loaded = GripScorer.from_pretrained(tmp_path / "saved")
    assert torch.equal(GripSelector(loaded)(batch), GripSelector(scorer.eval())(batch))


def test_bad_sizes_and_the_relaxation_are_refused(tmp_path):
    for size in (-1, 1.5, True):
        with pytest.raises(ScorerError, match=r"memory_width must be an integer >= 0, got"):
            GripScorerConfig(memory_width=size)
    with pytest.raises(ConfigError, match="memory_width must be 0, got 8"):
        TrainingPlan(tmp_path, method="relaxed", scorer={"memory_width": 8})
