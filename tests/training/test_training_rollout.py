import math
from types import SimpleNamespace

import pytest
import torch
from classroom import TOKENS, make_scorer, make_store
from versions import TRAINING

from grip_hf.config import ConfigError
from grip_hf.training.policy import PruningPolicy, score_groups
from grip_hf.training.rollout import BudgetRange, make_rollout

pytestmark = TRAINING

GROUP = 4


@pytest.fixture(scope="module")
def store():
    return make_store()


def trainer_of(policy, process=0, step=0, training=True):
    accelerator = SimpleNamespace(process_index=process, unwrap_model=lambda model: model)
    return SimpleNamespace(
        accelerator=accelerator,
        model=policy.train(training),
        num_generations=GROUP,
        num_generations_eval=GROUP,
        args=SimpleNamespace(seed=5),
        state=SimpleNamespace(global_step=step),
        temperature=1.0,
    )


def prompts(rows):
    return [[{"role": "user", "content": f"row {row}", "row": row}] for row in rows]


def test_a_rollout_draws_keep_sets_and_judges_them(store):
    policy = PruningPolicy.around(make_scorer(), store, TOKENS)
    rows = [0] * GROUP + [3] * GROUP
    torch.manual_seed(0)
    out = make_rollout(store, BudgetRange(0.1, 0.5))(prompts(rows), trainer_of(policy))
    assert out["prompt_ids"] == [[row] for row in rows] and out["logprobs"] is None and "env_mask" not in out
    assert {len(value) for name, value in out.items() if name != "logprobs"} == {2 * GROUP}
    assert len(set(out["budget"][:GROUP])) == 1 and len(set(out["keep_ratio"])) == 2
    assert len({tuple(picks) for picks in out["completion_ids"][:GROUP]}) > 1
    for picks, count, ratio in zip(out["completion_ids"], out["budget"], out["keep_ratio"], strict=True):
        assert len(set(picks)) == len(picks) == count == max(1, round(ratio * TOKENS)) and max(picks) < TOKENS
    assert out["answer"] == ["yes"] * GROUP + ["top left"] * GROUP and out["kind"] == ["k0"] * GROUP + ["k3"] * GROUP
    samples = store.samples(rows)
    for i in (1, 6):
        keep = torch.zeros(TOKENS, dtype=torch.bool)
        keep[out["completion_ids"][i]] = True
        alone = store.judge([samples[i]], [keep])
        assert out["kl"][i] == pytest.approx(alone.kl.item(), abs=1e-4)
        assert out["log_prob"][i] == pytest.approx(alone.log_prob.item(), abs=1e-4)


def test_budgets_agree_across_processes_and_change_with_steps(store):
    policy = PruningPolicy.around(make_scorer(), store, TOKENS)
    rollout = make_rollout(store, BudgetRange(0.1, 1.0))
    # Groups of four, three rows a process: the second group spans both.
    rows = [[0, 0, 0], [0, 1, 1], [1, 1, 2], [2, 2, 2]]
    ratios = [rollout(prompts(part), trainer_of(policy, process))["keep_ratio"] for process, part in enumerate(rows)]
    flat = [ratio for part in ratios for ratio in part]
    groups = [set(flat[i : i + GROUP]) for i in range(0, 12, GROUP)]
    assert [len(group) for group in groups] == [1, 1, 1] and len(set(flat)) == 3
    later = rollout(prompts(rows[0]), trainer_of(policy, step=1))["keep_ratio"]
    assert later != ratios[0]
    assert rollout(prompts(rows[0]), trainer_of(policy))["keep_ratio"] == ratios[0]


def test_the_greedy_member_keeps_the_best_and_is_not_trained_on(store):
    scorer = make_scorer()
    policy = PruningPolicy.around(scorer, store, TOKENS)
    out = make_rollout(store, BudgetRange(0.25, 0.25), greedy=True)(prompts([2] * GROUP), trainer_of(policy))
    scores = score_groups(scorer, store.visual([2], torch.tensor([4])))[0]
    assert out["completion_ids"][0] == scores.argsort(descending=True)[:4].tolist()
    assert out["env_mask"] == [[0] * 4] + [[1] * 4] * 3


@pytest.mark.parametrize("temperature", [0.4, 2.5])
def test_the_trainers_temperature_is_that_of_the_draws(store, temperature):
    """How often each token is the only one picked is its share of a softmax at the temperature, computed here."""
    scorer, draws = make_scorer(), 800
    policy = PruningPolicy.around(scorer, store, TOKENS)
    trainer = trainer_of(policy)
    trainer.temperature = temperature
    torch.manual_seed(0)
    out = make_rollout(store, BudgetRange(1 / TOKENS, 1 / TOKENS))(prompts([2] * draws), trainer)
    found = [0.0] * TOKENS
    for (pick,) in out["completion_ids"]:
        found[pick] += 1 / draws
    with torch.no_grad():
        scores = score_groups(scorer, store.visual([2], torch.tensor([1])))[0].tolist()

    def shares(heat):
        weights = [math.exp(score / heat) for score in scores]
        return [weight / sum(weights) for weight in weights]

    right, plain = shares(temperature), shares(1.0)
    assert sum(abs(a - b) for a, b in zip(right, plain, strict=True)) > 0.4
    for share, expected in zip(found, right, strict=True):
        assert share == pytest.approx(expected, abs=4 * math.sqrt(expected / draws) + 1 / draws)


def test_evaluation_is_greedy_throughout(store):
    policy = PruningPolicy.around(make_scorer(), store, TOKENS)
    out = make_rollout(store, BudgetRange(0.25, 0.25))(prompts([2] * GROUP), trainer_of(policy, training=False))
    assert len({tuple(picks) for picks in out["completion_ids"]}) == 1


@pytest.mark.parametrize("low,high", [(0, 0.5), (0.5, 0.4), (0.1, 1.5), (float("nan"), 0.5), (True, 1), ("a", 1)])
def test_bad_budget_ranges(low, high):
    with pytest.raises(ConfigError, match="budgets must be"):
        BudgetRange(low, high)


def test_budgets_cover_their_range_log_uniformly():
    draws = torch.tensor([BudgetRange(0.03, 0.6).draw(str(i)) for i in range(2000)])
    assert draws.min() >= 0.03 and draws.max() <= 0.6
    middle = (0.03 * 0.6) ** 0.5
    assert (draws < middle).float().mean() == pytest.approx(0.5, abs=0.05)
