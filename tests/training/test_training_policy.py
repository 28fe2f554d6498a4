import itertools

import pytest
import torch
from classroom import TOKENS, build_vlm, make_scorer, make_store, rows
from plackett_luce import entropy, log_prob
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from grip_hf.frozen.data import DatasetExamples
from grip_hf.frozen.store import SampleStore
from grip_hf.frozen.vlm import FrozenVLM
from grip_hf.training.policy import PruningPolicy, keep_set_tokenizer, score_groups

TEMPERATURE = 0.7


class FewTokens:
    """A store whose examples have few visual tokens, so that all lists of picks can be tried."""

    def __init__(self, store, sizes):
        self.store, self.sizes = store, sizes

    def visual(self, rows, budgets):
        batch = self.store.visual(rows, budgets)
        for row, size in enumerate(self.sizes[i] for i in rows):
            batch.mask[row, size:] = False
        width = max(self.sizes[i] for i in rows)
        cut = {name: getattr(batch, name)[:, :width] for name in ("tokens", "mask", "positions", "image_index")}
        return type(batch)(**cut, text=batch.text, text_mask=batch.text_mask, budgets=budgets)


@pytest.fixture(scope="module")
def store():
    return make_store()


def ask(policy, picks, row, lengths=None):
    """TRL's per-token log-probs and entropies of lists of picks [B, K] about one row."""
    ids = torch.cat([torch.full((len(picks), 1), row), picks], 1)
    mask = torch.ones_like(ids)
    for i, length in enumerate(lengths or []):
        mask[i, 1 + length :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    out = policy(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    return out.log_probs[:, -picks.shape[1] :], out.entropy[:, -picks.shape[1] :]


def fused(scorer, store, num_actions):
    policy = PruningPolicy.around(scorer, store, num_actions)
    add_fused_lm_head(policy, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    return policy


@pytest.mark.parametrize("count", [1, 2, 3])
def test_log_probs_and_entropies_equal_brute_force_over_all_lists(store, count):
    size, scorer = 5, make_scorer()
    few = FewTokens(store, [size] * 8)
    lists = torch.tensor(list(itertools.permutations(range(size), count)))
    with torch.no_grad():
        logs, entropies = ask(fused(scorer, few, TOKENS), lists, row=2)
        scores = score_groups(scorer, few.visual([2], torch.tensor([count])))[0].double() / TEMPERATURE
    assert scores.std() > 0.05
    for picks, log, ent in zip(lists.tolist(), logs.tolist(), entropies.tolist(), strict=True):
        left = list(range(size))
        for step, pick in enumerate(picks):
            weights = torch.tensor([float(scores[token].exp()) for token in left])
            shares = weights / weights.sum()
            assert log[step] == pytest.approx(float(shares[left.index(pick)].log()), abs=1e-5)
            assert ent[step] == pytest.approx(float(-(shares * shares.log()).sum()), abs=1e-5)
            left.remove(pick)
    assert float(logs.double().sum(1).exp().sum()) == pytest.approx(1, abs=1e-5)


def test_the_identity_head_equals_the_direct_formula_with_gradients(store):
    scorer, other = make_scorer(), make_scorer()
    torch.manual_seed(3)
    order = torch.stack([torch.randperm(TOKENS)[:6] for _ in range(4)])
    lengths = [6, 2, 6, 2]
    order_padded = order.clone()
    for i, length in enumerate(lengths):
        order_padded[i, length:] = -1
    weight = torch.randn(4, 6)
    logs, entropies = ask(fused(scorer, store, 20), order, row=1, lengths=lengths)
    ((logs + 0.3 * entropies) * weight).sum().backward()
    batch = store.visual([1] * 4, torch.tensor(lengths))
    scores = score_groups(other, batch) / TEMPERATURE
    mine, spread = log_prob(scores, batch.mask, order_padded), entropy(scores, batch.mask, order_padded)
    ((mine + 0.3 * spread) * weight).sum().backward()
    torch.testing.assert_close(logs, mine, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropies, spread, atol=1e-5, rtol=0)
    for (name, a), b in zip(scorer.named_parameters(), other.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_rows_of_different_sizes_in_one_batch(store):
    few = FewTokens(store, [5, 9, 3, 5, 5, 5, 5, 5])
    policy, scorer = fused(make_scorer(), few, 12), make_scorer()
    ids = torch.tensor([[0, 4, 1], [1, 8, 0], [2, 2, 1]])
    labels = ids.clone()
    labels[:, 0] = -100
    with torch.no_grad():
        logs = policy(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, fused_lm_head=True).log_probs
        for row in range(3):
            batch = few.visual([row], torch.tensor([2]))
            wanted = log_prob(score_groups(scorer, batch) / TEMPERATURE, batch.mask, ids[row : row + 1, 1:])
            torch.testing.assert_close(logs[row : row + 1, -2:], wanted, atol=1e-4, rtol=0)


def test_a_group_is_scored_once(store):
    scorer = make_scorer()
    policy, sizes = fused(scorer, store, TOKENS), []
    scorer.register_forward_hook(lambda _, args, out: sizes.append(len(out)))
    ids = torch.tensor([[3, 1, 2], [3, 5, 4], [3, 0, 9], [1, 1, 2]])
    policy.backbone(ids, torch.ones_like(ids))
    assert sizes == [2]


def test_checkpoints_hold_the_scorer_alone(store, tmp_path):
    scorer = make_scorer()
    policy = PruningPolicy.around(scorer, store, TOKENS)
    policy.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {name.removeprefix("backbone.scorer.") for name in saved} == set(scorer.state_dict())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, PruningPolicy) and torch.equal(again.head.weight, torch.eye(TOKENS))
    for name, value in again.scorer.state_dict().items():
        assert torch.equal(value, scorer.state_dict()[name])
    with pytest.raises(RuntimeError, match="no sample store"):
        again.backbone(torch.tensor([[0, 1]]), torch.ones(1, 2).long())


def test_too_many_visual_tokens():
    store = SampleStore(FrozenVLM(*build_vlm()), DatasetExamples(rows(1)))
    policy = PruningPolicy.around(make_scorer(), store, TOKENS - 1)
    with pytest.raises(ValueError, match="16 visual tokens, the policy allows 15"):
        policy.backbone(torch.tensor([[0, 1]]), torch.ones(1, 2).long())


def test_completions_read_as_numbers():
    tokenizer = keep_set_tokenizer(16)
    assert tokenizer.decode([3, 15, 0]) == "3 15 0"
    assert tokenizer.pad_token_id == 16 and tokenizer.eos_token_id == 17
