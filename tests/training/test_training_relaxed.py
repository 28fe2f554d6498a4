import pytest
import torch
from classroom import TOKENS, build_vlm, make_scorer, make_store
from classroom import rows as picture_rows
from versions import TRAINING

from grip_hf.frozen.data import DatasetExamples
from grip_hf.frozen.store import SampleStore
from grip_hf.frozen.vlm import FrozenVLM
from grip_hf.training.policy import score_groups
from grip_hf.training.relaxed import RelaxedTrainer, gated_logits, soft_topk, straight_through
from grip_hf.training.supervised import training_arguments

pytestmark = TRAINING


def test_soft_topk_spends_the_budget_and_sharpens():
    torch.manual_seed(0)
    scores = torch.randn(3, 9)
    mask = torch.ones(3, 9).bool()
    mask[2, 5:] = False
    budgets = torch.tensor([1, 6, 3])
    weights = soft_topk(scores, mask, budgets, 0.5)
    torch.testing.assert_close(weights.sum(1), budgets.float(), atol=1e-3, rtol=0)
    assert (weights[2, 5:] == 0).all() and (weights >= 0).all() and (weights <= 1).all()
    sharp = soft_topk(scores, mask, budgets, 1e-3)
    for row in range(3):
        best = scores[row, mask[row]].topk(int(budgets[row])).indices
        assert (sharp[row, best] > 0.99).all()


def test_soft_gates_are_the_weights_themselves():
    torch.manual_seed(0)
    scores, mask, budgets = torch.randn(2, 7), torch.ones(2, 7).bool(), torch.tensor([2, 5])
    gates = straight_through(scores, mask, budgets, 0.7, noise=0.0, soft_gates=True)
    torch.testing.assert_close(gates, soft_topk(scores, mask, budgets, 0.7))
    torch.testing.assert_close(gates.sum(1), budgets.float(), atol=1e-3, rtol=0)


def test_the_temperature_falls_by_the_same_factor_each_step(tmp_path):
    arguments = training_arguments(str(tmp_path), max_steps=4, per_device_train_batch_size=2, use_cpu=True)
    arguments.set_save(strategy="no")
    trainer = RelaxedTrainer(make_scorer(), make_store(), arguments, temperature=1.6, final_temperature=0.1)
    seen, own = [], trainer.loss

    def loss(*given):
        seen.append(trainer.temperature)
        return own(*given)

    trainer.loss = loss
    trainer.train()
    assert seen == pytest.approx([1.6, 0.8, 0.4, 0.2])


def test_soft_topk_has_the_gradient_of_the_constrained_weights():
    scores = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask, budgets = torch.ones(2, 6).bool(), torch.tensor([2, 4])

    def weights(values):
        return soft_topk(values, mask, budgets, 0.7, rounds=80)

    assert torch.autograd.gradcheck(weights, scores.requires_grad_())


def test_straight_through_is_hard_forward_and_soft_backward():
    torch.manual_seed(0)
    scores = torch.randn(2, 8, requires_grad=True)
    mask, budgets = torch.ones(2, 8).bool(), torch.tensor([3, 5])
    gates = straight_through(scores, mask, budgets, 1.0, noise=0.0)
    torch.testing.assert_close(gates.sum(1), budgets.float())
    assert set(gates[0].topk(3).indices.tolist()) == set(scores[0].topk(3).indices.tolist())
    gates[0, scores[0].argmin()].backward()
    assert scores.grad[0, scores[0].argmin()] > 0, "a dropped token gets no gradient"


@pytest.fixture(scope="module")
def store():
    return make_store()


def test_hard_gates_equal_pruning(store):
    samples = store.samples([0, 3, 4])
    torch.manual_seed(2)
    keep = torch.stack([torch.rand(TOKENS).argsort() < count for count in (2, 5, 11)])
    real = torch.ones_like(keep)

    with torch.no_grad():
        gated = gated_logits(store.vlm, samples, keep.float(), real).log_softmax(-1)
        pruned = store.vlm.run(samples, list(keep)).logits.log_softmax(-1)
    for row, sample in enumerate(samples):
        count = len(sample.answer)
        torch.testing.assert_close(gated[row, -count:], pruned[row, -count:], atol=1e-3, rtol=0)


def test_gradients_tell_what_a_dropped_token_would_do(store):
    """The gate's derivative at 0 is the one-sided finite difference of letting the token in a little."""
    samples = store.samples([0])
    gates = torch.zeros(1, TOKENS)
    gates[0, :4] = 1
    real = torch.ones_like(gates).bool()

    def told(values):
        return gated_logits(store.vlm, samples, values, real).log_softmax(-1)[0, -2, samples[0].answer[0]]

    gates.requires_grad_()
    (slope,) = torch.autograd.grad(told(gates), gates)
    step = 1e-4
    for token in (6, 9):
        moved = gates.detach().clone()
        moved[0, token] = step
        with torch.no_grad():
            difference = float(told(moved) - told(gates.detach())) / step
        assert float(slope[0, token]) == pytest.approx(difference, rel=0.1, abs=0.02)


@pytest.mark.parametrize("draws", [1, 2])
def test_the_loss_is_divergence_minus_probability_of_the_drawn_keep_sets(tmp_path, draws):
    """The same Gumbel noise, picked by sorting; the answers are judged by really dropping tokens."""
    # Answers of one token, the model's own, so that their probability weighs something.
    examples = [{name: value for name, value in row.items() if name != "answer"} for row in picture_rows()]
    store = SampleStore(FrozenVLM(*build_vlm(), max_answer_tokens=1), DatasetExamples(examples))
    scorer, rows, count = make_scorer(), [0, 1, 5, 6], 8
    args = training_arguments(str(tmp_path), use_cpu=True)
    trainer = RelaxedTrainer(scorer, store, args, (count / TOKENS, count / TOKENS), draws=draws)
    torch.manual_seed(4)
    found = trainer.loss(scorer, rows)
    with torch.no_grad():
        scores = score_groups(scorer, store.visual(rows, torch.full((len(rows),), count)))
    torch.manual_seed(4)
    noise = -torch.empty(draws * len(rows), TOKENS).exponential_().log()
    total, chance = 0.0, 0.0
    for place, noisy in enumerate(noise + torch.cat([scores] * draws)):
        keep = torch.zeros(TOKENS, dtype=torch.bool)
        keep[sorted(range(TOKENS), key=lambda token: -float(noisy[token]))[:count]] = True
        verdict = store.judge(store.samples([rows[place % len(rows)]]), [keep])
        chance += float(verdict.log_prob.exp()) / len(noise)
        total += float(verdict.kl - verdict.log_prob.exp()) / len(noise)
    assert chance > 0.03
    assert found.item() == pytest.approx(total, abs=1e-3)


def test_the_relaxation_learns(tmp_path, store):
    scorer = make_scorer()
    args = training_arguments(
        str(tmp_path),
        max_steps=25,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        warmup_steps=0,
        use_cpu=True,
        disable_tqdm=True,
    )
    budgets = torch.full((8,), 3)

    def answers():
        batch = store.visual(list(range(8)), budgets)
        with torch.no_grad():
            best = score_groups(scorer, batch).topk(3).indices
        return store.judge(
            store.samples(range(8)), list(torch.zeros(8, TOKENS).bool().scatter(1, best, True))
        ).kl.mean()

    before = answers()
    trainer = RelaxedTrainer(scorer, store, args, (0.19, 0.19), temperature=0.5, draws=2)
    trainer.train()
    assert answers() < 0.95 * before
    logged = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert logged and all(0 <= entry["correct"] <= 1 for entry in logged)
