import itertools

import pytest
import torch
from classroom import TOKENS, build_vlm, make_scorer, make_store, rows
from plackett_luce import entropy, log_prob
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from versions import FUSED, TRAINING

from grip_hf.errors import ScorerError
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


def ask(policy, ids, mask):
    """Per-token log-probs and entropies of lists of picks `ids` [B, 1 + K], as TRL finds them in this policy."""
    if hasattr(policy, "fused"):
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, 0] = -100
        out = policy(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        return out.log_probs[:, 1 - ids.shape[1] :], out.entropy[:, 1 - ids.shape[1] :]
    logs = (policy(input_ids=ids, attention_mask=mask).logits[:, :-1] / TEMPERATURE).log_softmax(-1)
    real = mask[:, 1:]
    return logs.gather(2, ids[:, 1:, None])[..., 0] * real, -(logs.exp() * logs).sum(-1) * real


def ask_about(policy, picks, row, lengths=None):
    """The same of lists of picks [B, K] about one row, of which the first `lengths` are real."""
    ids = torch.cat([torch.full((len(picks), 1), row), picks], 1)
    mask = torch.ones_like(ids)
    for i, length in enumerate(lengths or []):
        mask[i, 1 + length :] = 0
    return ask(policy, ids, mask)


@pytest.fixture(params=["logits", pytest.param("fused", marks=FUSED)])
def scored(request):
    """Makes a policy that is asked in one of the two ways that releases of TRL have."""

    def make(scorer, store, num_actions):
        policy = PruningPolicy.around(scorer, store, num_actions)
        if request.param == "fused":
            from trl.trainer.utils import add_fused_lm_head

            add_fused_lm_head(policy, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
            policy.fused = True
        return policy

    return make


@pytest.mark.parametrize("count", [1, 2, 3])
@TRAINING
def test_log_probs_and_entropies_equal_brute_force_over_all_lists(store, scored, count):
    size, scorer = 5, make_scorer()
    few = FewTokens(store, [size] * 8)
    lists = torch.tensor(list(itertools.permutations(range(size), count)))
    with torch.no_grad():
        logs, entropies = ask_about(scored(scorer, few, TOKENS), lists, row=2)
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


@TRAINING
def test_the_identity_head_equals_the_direct_formula_with_gradients(store, scored):
    scorer, other = make_scorer(), make_scorer()
    torch.manual_seed(3)
    order = torch.stack([torch.randperm(TOKENS)[:6] for _ in range(4)])
    lengths = [6, 2, 6, 2]
    order_padded = order.clone()
    for i, length in enumerate(lengths):
        order_padded[i, length:] = -1
    weight = torch.randn(4, 6)
    logs, entropies = ask_about(scored(scorer, store, 20), order, row=1, lengths=lengths)
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


@TRAINING
def test_rows_of_different_sizes_in_one_batch(store, scored):
    few = FewTokens(store, [5, 9, 3, 5, 5, 5, 5, 5])
    policy, scorer = scored(make_scorer(), few, 12), make_scorer()
    ids = torch.tensor([[0, 4, 1], [1, 8, 0], [2, 2, 1]])
    with torch.no_grad():
        logs, _ = ask(policy, ids, torch.ones_like(ids))
        for row in range(3):
            batch = few.visual([row], torch.tensor([2]))
            wanted = log_prob(score_groups(scorer, batch) / TEMPERATURE, batch.mask, ids[row : row + 1, 1:])
            torch.testing.assert_close(logs[row : row + 1, -2:], wanted, atol=1e-4, rtol=0)


@TRAINING
def test_the_scorer_is_told_the_share_that_each_group_keeps(store):
    """Also of groups with padding; the gradient reaches the budget's weights by it."""
    scorer, sizes, counts = make_scorer(), [5, 9, 16, 12], [1, 6, 16, 20]
    batch = FewTokens(store, sizes).visual([0, 1, 2, 3], torch.tensor(counts))
    ratios = [min(count / size, 1.0) for count, size in zip(counts, sizes, strict=True)]
    found = score_groups(scorer, batch)
    for row, (size, ratio) in enumerate(zip(sizes, ratios, strict=True)):
        one, words = slice(row, row + 1), int(batch.text_mask[row].sum())
        assert batch.text_mask[row, :words].all()
        expected = scorer(
            batch.tokens[one, :size],
            torch.ones(1, size, dtype=torch.bool),
            batch.text[one, :words],
            torch.ones(1, words, dtype=torch.bool),
            torch.tensor([ratio]),
            batch.positions[one, :size],
        )
        torch.testing.assert_close(found[row, :size], expected[0], atol=1e-4, rtol=0)
    spread = [score_groups(scorer, store.visual([2], torch.tensor([count])))[0] for count in (1, 8)]
    assert (spread[0] - spread[1]).abs().max() > 1e-2  # so that another ratio would show above


@TRAINING
def test_a_group_is_scored_once(store):
    scorer = make_scorer()
    policy, sizes = PruningPolicy.around(scorer, store, TOKENS), []
    scorer.register_forward_hook(lambda _, args, out: sizes.append(len(out)))
    ids = torch.tensor([[3, 1, 2], [3, 5, 4], [3, 0, 9], [1, 1, 2]])
    policy.backbone(ids, torch.ones_like(ids))
    assert sizes == [2]


def test_checkpoints_hold_the_scorer_alone(tmp_path):
    scorer = make_scorer()
    with torch.no_grad():
        for weight in scorer.parameters():  # none is as a new one starts
            weight.add_(torch.rand_like(weight))
    PruningPolicy.around(scorer, None, TOKENS).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {name.removeprefix("backbone.scorer.") for name in saved} == set(scorer.state_dict())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, PruningPolicy) and torch.equal(again.head.weight, torch.eye(TOKENS))
    for name, value in again.scorer.state_dict().items():
        assert torch.equal(value, scorer.state_dict()[name])
    with pytest.raises(RuntimeError, match="no sample store"):
        again.backbone(torch.tensor([[0, 1]]), torch.ones(1, 2).long())


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_checkpoints_that_do_not_fit_are_refused(tmp_path, change):
    PruningPolicy.around(make_scorer(), None, TOKENS).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    value = tensors.pop("backbone.scorer.visual.weight")
    if change == "unexpected":
        tensors |= {"backbone.scorer.visual.weight": value, "backbone.scorer.other": value.clone()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ScorerError, match=f"{change}_keys.*backbone.scorer"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@TRAINING
def test_padding_and_the_end_are_never_picked(store):
    """TRL reads logits at the ids of both; their share is 0, whatever the scores."""
    ids = torch.tensor([[3, 1, 2, TOKENS]])
    out = PruningPolicy.around(make_scorer(), store, TOKENS)(
        input_ids=ids, attention_mask=torch.tensor([[1, 1, 1, 0]])
    )
    assert out.logits.shape == (1, 4, TOKENS + 2)
    assert not out.logits[:, :3].softmax(-1)[..., TOKENS:].any()


@TRAINING
def test_too_many_visual_tokens():
    store = SampleStore(FrozenVLM(*build_vlm()), DatasetExamples(rows(1)))
    policy = PruningPolicy.around(make_scorer(), store, TOKENS - 1)
    with pytest.raises(ValueError, match="16 visual tokens, the policy allows 15"):
        policy.backbone(torch.tensor([[0, 1]]), torch.ones(1, 2).long())


def test_completions_read_as_numbers():
    tokenizer = keep_set_tokenizer(16)
    assert tokenizer.decode([3, 15, 0]) == "3 15 0"
    assert tokenizer.pad_token_id == 16 and tokenizer.eos_token_id == 17
