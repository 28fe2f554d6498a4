import math

import pytest
import torch
from classroom import TOKENS, make_scorer, make_store
from versions import TRAINING

from grip_hf.config import ConfigError
from grip_hf.training.importance import spread_out
from grip_hf.training.policy import score_groups
from grip_hf.training.supervised import training_arguments
from grip_hf.training.warmup import WarmupTrainer, ranking_loss, share_loss

pytestmark = TRAINING


def test_the_ranking_loss_equals_loops():
    torch.manual_seed(0)
    scores, mask, kept = torch.randn(3, 6), torch.ones(3, 6).bool(), torch.zeros(3, 6).bool()
    mask[1, 4:] = False
    kept[0, [1, 4]] = kept[1, :3] = kept[2] = True  # of the last, nothing is dropped
    total = 0.0
    for g, row in enumerate(kept):
        dropped = [float(scores[g, t]) for t in range(6) if mask[g, t] and not row[t]]
        for t in row.nonzero().flatten():
            mine = math.exp(float(scores[g, t]))
            total -= math.log(mine / (mine + sum(map(math.exp, dropped)))) / int(row.sum())
    assert float(ranking_loss(scores, mask, kept)) == pytest.approx(total / 3, abs=1e-5)


def test_share_loss_is_the_cross_entropy_of_both_distributions():
    scores, mask = torch.tensor([[0.5, -1.0, 2.0, 9.0], [1.0, 0.0, -2.0, 0.3]]), torch.ones(2, 4).bool()
    mask[0, 3] = False
    importance = torch.tensor([[3.0, 1.0, 0.0, 0.0], [1.0, 1.0, 2.0, 4.0]])
    total = 0.0
    for g in range(2):
        real = [t for t in range(4) if mask[g, t]]
        weights = [math.exp(float(scores[g, t])) for t in real]
        for t, weight in zip(real, weights, strict=True):
            total -= float(importance[g, t] / importance[g].sum()) * math.log(weight / sum(weights))
    assert float(share_loss(scores, mask, importance)) == pytest.approx(total / 2, abs=1e-5)


def test_the_loss_is_the_weighted_sum_of_both(tmp_path):
    store, scorer, rows = make_store(), make_scorer(), list(range(6))
    args = training_arguments(str(tmp_path), use_cpu=True)
    by_weight = {}
    for weight in (0.0, 1.0, 3.0):
        trainer = WarmupTrainer(scorer, store, args, (0.1, 0.4), share_weight=weight)
        by_weight[weight] = float(trainer.loss(scorer, rows).detach())
    batch = store.visual(rows, trainer.draw_budgets(rows))
    alone = float(share_loss(score_groups(scorer, batch).detach(), batch.mask, trainer.importance(rows)))
    assert alone > 0.1
    assert by_weight[1.0] - by_weight[0.0] == pytest.approx(alone, abs=1e-4)
    assert by_weight[3.0] - by_weight[0.0] == pytest.approx(3 * alone, abs=1e-4)


def test_where_nothing_is_dropped_there_is_nothing_to_learn():
    scores, all_of_them = torch.zeros(1, 3, requires_grad=True), torch.ones(1, 3).bool()
    loss = ranking_loss(scores, all_of_them, all_of_them)
    loss.backward()
    assert float(loss.detach()) == 0 and not scores.grad.any()


def test_targets_are_what_the_frozen_model_answers_better_with(tmp_path):
    store, rows = make_store(24), list(range(24))
    trainer = WarmupTrainer(make_scorer(), store, training_arguments(str(tmp_path), use_cpu=True))
    batch = store.visual(rows, torch.tensor([1, 2, 3, 4, 6, 8, 12, 16] * 3))
    importance = trainer.importance(rows)
    kept = trainer.targets(rows, batch, importance)
    spread = spread_out(batch.tokens, batch.mask, importance, batch.budgets)
    taken = []
    for i, sample in enumerate(store.samples(rows)):
        top = torch.zeros(TOKENS).bool()
        top[importance[i].argsort(descending=True, stable=True)[: batch.budgets[i]]] = True
        by_kl = sorted((top, spread[i]), key=lambda one: float(store.judge([sample], [one]).kl))
        assert torch.equal(kept[i], by_kl[0])
        if not torch.equal(top, spread[i]):
            taken.append(torch.equal(kept[i], top))
    assert any(taken) and not all(taken)  # both kinds were among them


def test_budgets_change_with_places_and_steps_and_come_back(tmp_path):
    trainer = WarmupTrainer(make_scorer(), make_store(), training_arguments(str(tmp_path), use_cpu=True), (0.1, 1.0))
    drawn = []
    for step in (0, 1, 0):
        trainer.state.global_step = step
        drawn.append(trainer.draw_budgets([3] * 12).tolist())
    assert drawn[0] == drawn[2] != drawn[1]
    assert len({*drawn[0], *drawn[1]}) > 3
    assert all(round(0.1 * TOKENS) <= count <= TOKENS for count in drawn[0] + drawn[1])


@pytest.mark.parametrize("target", ["combined", "gradient", "attention"])
def test_warm_up_learns_the_targets(tmp_path, target):
    store, scorer = make_store(), make_scorer()
    args = training_arguments(
        str(tmp_path),
        max_steps=30,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        warmup_steps=0,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = WarmupTrainer(scorer, store, args, (0.1, 0.4), target=target)
    batch, wanted = store.visual(list(range(8)), torch.full((8,), 4)), trainer.importance(list(range(8)))

    def overlap():
        with torch.no_grad():
            scores = scorer(
                *(getattr(batch, n) for n in ("tokens", "mask", "text", "text_mask")),
                torch.full((8,), 0.25),
                batch.positions,
            )
        best, true = scores.topk(4).indices.tolist(), wanted.topk(4).indices.tolist()
        return sum(len(set(a) & set(b)) for a, b in zip(best, true, strict=True)) / 32

    before = overlap()
    trainer.train()
    assert overlap() > before + 0.2


def test_bad_settings(tmp_path):
    with pytest.raises(ConfigError, match="target must be one of"):
        WarmupTrainer(make_scorer(), make_store(1), training_arguments(str(tmp_path), use_cpu=True), target="magic")
    with pytest.raises(ConfigError, match=r"share_weight must be a number >= 0, got -1\.0"):
        WarmupTrainer(make_scorer(), make_store(1), training_arguments(str(tmp_path), use_cpu=True), share_weight=-1.0)
    with pytest.raises(ConfigError, match="cannot be set up"):
        training_arguments(str(tmp_path), no_such_setting=1)
