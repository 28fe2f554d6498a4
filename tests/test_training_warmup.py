import pytest
import torch
from classroom import make_scorer, make_store

from grip_hf.config import ConfigError
from grip_hf.training.supervised import training_arguments
from grip_hf.training.warmup import WarmupTrainer, ranking_loss


def test_the_ranking_loss_equals_loops():
    torch.manual_seed(0)
    scores, importance = torch.randn(3, 6), torch.rand(3, 6)
    mask = torch.ones(3, 6).bool()
    mask[1, 4:] = False
    budgets = torch.tensor([2, 6, 3])  # more than the four real tokens of the second
    total = 0.0
    for g in range(3):
        real = [t for t in range(6) if mask[g, t]]
        ranked = sorted(real, key=lambda t: -float(importance[g, t]))[: int(budgets[g])]
        shares = torch.tensor([float(importance[g, t]) ** 0.5 for t in ranked])
        shares = shares / shares.sum()
        left = list(real)
        for share, token in zip(shares, ranked, strict=True):
            total -= float(share * (scores[g, token] - torch.logsumexp(scores[g, left], 0)))
            left.remove(token)
    assert float(ranking_loss(scores, mask, importance, budgets)) == pytest.approx(total / 3, abs=1e-5)


def test_the_ranking_loss_is_finite_without_any_importance():
    loss = ranking_loss(
        torch.zeros(1, 3, requires_grad=True), torch.ones(1, 3).bool(), torch.zeros(1, 3), torch.tensor([2])
    )
    assert float(loss.detach()) == 0


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
    with pytest.raises(ConfigError, match="cannot be set up"):
        training_arguments(str(tmp_path), no_such_setting=1)
