"""Each selector against a plain calculation, and what all of them must hold."""

import dataclasses
import math

import pytest
import torch
from batches import WIDTH, join, one_group

from grip_hf.engine.keepsets import topk_mask
from grip_hf.errors import ConfigError, ScorerError
from grip_hf.families.towers import attention_received, real_keys
from grip_hf.scorer.model import GripScorer, GripScorerConfig
from grip_hf.selectors import SELECTORS, Selector, get_selector, register
from grip_hf.selectors.inside import InsideSelector
from grip_hf.selectors.random import mix

SCORING = sorted(name for name, cls in SELECTORS.items() if not issubclass(cls, InsideSelector))


def build(name):
    if name != "grip":
        return get_selector(name)
    torch.manual_seed(0)
    return get_selector("grip", scorer=GripScorer(GripScorerConfig(hidden_size=WIDTH, width=16, attention_width=8)))


def kept(selector, batch):
    return topk_mask(selector(batch), batch.mask, batch.budgets)


@pytest.mark.parametrize("name", SCORING)
def test_any_count_any_batch(name):
    selector = build(name)
    groups = [
        one_group((16,), words=3, budget=5, seed=1),
        one_group((9, 4), words=5, budget=7, seed=2),
        one_group((1,), words=1, budget=3, seed=3),
        one_group((25,), words=0, budget=25, seed=4),
        one_group((4, 4, 4), words=2, budget=1, seed=5),
    ]
    batch = join(groups)
    scores = selector(batch)
    assert scores.shape == batch.mask.shape and scores.dtype == torch.float32
    assert scores[batch.mask].isfinite().all()
    keep = topk_mask(scores, batch.mask, batch.budgets)
    assert keep.sum(1).tolist() == [5, 7, 1, 25, 1]
    for row, group in enumerate(groups):
        total = group.mask.shape[1]
        alone = selector(group)
        torch.testing.assert_close(scores[row, :total], alone[0], atol=1e-5, rtol=1e-4)
        assert torch.equal(keep[row, :total], topk_mask(alone, group.mask, group.budgets)[0])
    assert torch.equal(selector(batch), scores)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", SCORING)
def test_tokens_of_any_precision(name, dtype):
    batch = one_group((25,))
    scores = build(name)(dataclasses.replace(batch, tokens=batch.tokens.to(dtype), text=batch.text.to(dtype)))
    assert scores.dtype == torch.float32 and scores.isfinite().all()


def test_random_depends_on_picture_and_seed_only():
    batch = one_group((36, 36), budget=20)
    keep = kept(build("random"), batch)
    noisy = dataclasses.replace(batch, tokens=batch.tokens * (1 + 1e-6 * torch.randn(batch.tokens.shape)))
    asked = dataclasses.replace(batch, text=batch.text + 1)
    assert torch.equal(kept(build("random"), noisy), keep) and torch.equal(kept(build("random"), asked), keep)
    assert not torch.equal(kept(build("random"), one_group((36, 36), budget=20, seed=9)), keep)
    assert not torch.equal(kept(get_selector("random", seed=1), batch), keep)
    # The second picture is scored as it is when it stands alone.
    alone = dataclasses.replace(
        one_group((36,)), tokens=batch.tokens[:, 36:], image_index=torch.zeros(1, 36, dtype=torch.long)
    )
    assert torch.equal(build("random")(alone), build("random")(batch)[:, 36:])


def test_random_is_uniform():
    scores = torch.cat([build("random")(one_group((144,), seed=seed)) for seed in range(200)])
    counts = torch.histc(scores, 10, 0, 1) / scores.numel()
    assert (counts - 0.1).abs().max() < 0.01
    assert scores.mean(0).sub(0.5).abs().max() < 0.1 and scores.mean(1).sub(0.5).abs().max() < 0.1
    pairs = (scores[:, 1:] - 0.5) * (scores[:, :-1] - 0.5) * 12
    assert pairs.mean().abs() < 0.03


def test_mix_is_splitmix64():
    def reference(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    for z in (0, 1, 12345, 2**63 + 5, 2**64 - 1):
        signed = z - 2**64 if z >= 2**63 else z
        assert int(mix(torch.tensor([signed]))) % 2**64 == reference(z)


@pytest.mark.parametrize(("side", "budget", "every"), [(24, 64, 3), (24, 144, 2), (12, 16, 3), (10, 25, 2)])
def test_grid_is_the_regular_grid_where_there_is_one(side, budget, every):
    keep = kept(build("grid"), one_group((side * side,), budget=budget))[0].reshape(side, side)
    first = (every - 1) // 2 if every % 2 else every // 2
    rows = {int(r) for r in keep.nonzero()[:, 0]}
    columns = {int(c) for c in keep.nonzero()[:, 1]}
    assert len(rows) == len(columns) == side // every and keep.sum() == budget
    if every % 2:
        assert rows == columns == set(range(first, side, every))


@pytest.mark.parametrize("budget", [3, 7, 29, 50, 100, 143])
def test_grid_is_even_at_any_budget(budget):
    """No quarter of the picture gets much more than its share, and no hole is much larger than needed."""
    batch = one_group((144,), budget=budget)
    keep = kept(build("grid"), batch)[0]
    points, everywhere = batch.positions[0][keep], batch.positions[0]
    quarters = torch.histc((points[:, 0] > 0.5) * 2.0 + (points[:, 1] > 0.5) * 1.0, 4, -0.5, 3.5)
    assert keep.sum() == budget and (quarters - budget / 4).abs().max() <= 0.25 * math.sqrt(budget) + 1
    hole = torch.cdist(everywhere, points).amin(1).max()
    assert hole <= 1.3 / math.sqrt(budget)


def test_grid_shares_the_budget_among_images_and_tiles():
    keep = kept(build("grid"), one_group((64, 16), budget=10))[0]
    assert keep[:64].sum() == 8 and keep[64:].sum() == 2
    tiles = one_group((16, 16), budget=8)
    tiles = dataclasses.replace(tiles, image_index=torch.zeros_like(tiles.image_index))
    keep = kept(build("grid"), tiles)[0]
    assert keep[:16].sum() == keep[16:].sum() == 4
    assert torch.equal(keep[:16], kept(build("grid"), one_group((16,), budget=4))[0])


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_similarity_equals_plain_loops(pooling):
    batch = join([one_group((9,), words=4), one_group((4,), words=2, seed=1)])
    scores = get_selector("similarity", pooling=pooling)(batch)
    for g, (tokens, words) in enumerate([(9, 4), (4, 2)]):
        for n in range(tokens):
            found = []
            for t in range(words):
                a, b = batch.tokens[g, n], batch.text[g, t]
                found.append(float((a * b).sum() / (a.pow(2).sum().sqrt() * b.pow(2).sum().sqrt())))
            expected = max(found) if pooling == "max" else sum(found) / len(found)
            assert float(scores[g, n]) == pytest.approx(expected, abs=1e-5)


def maxmin_reference(tokens, budget):
    """DivPrune's greedy choice in plain loops: the picks in order."""
    unit = [t / t.norm() for t in tokens.double()]
    distance = [[1 - float(a @ b) for b in unit] for a in unit]
    everyone = range(len(unit))
    isolation = [min(distance[i][j] for j in everyone if j != i) for i in everyone]
    picks = [isolation.index(max(isolation))]
    while len(picks) < budget:
        gaps = {i: min(distance[i][p] for p in picks) for i in everyone if i not in picks}
        picks.append(max(gaps, key=gaps.__getitem__))
    return picks


@pytest.mark.parametrize("budget", [1, 2, 6, 16])
def test_diversity_equals_plain_loops(budget):
    groups = [one_group((16,), budget=budget, seed=seed) for seed in range(3)]
    scores = build("diversity")(join([*groups, one_group((25,), budget=9)]))
    for row, group in enumerate(groups):
        picks = scores[row, :16].argsort(descending=True)[:budget].tolist()
        assert picks == maxmin_reference(group.tokens[0], budget)


def test_diversity_keeps_no_duplicates():
    batch = one_group((16,), budget=8)
    doubled = dataclasses.replace(batch, tokens=batch.tokens[:, :8].repeat(1, 2, 1))
    keep = kept(build("diversity"), doubled)[0]
    assert (keep[:8] ^ keep[8:]).all()


@pytest.mark.parametrize("queries", [1, 600])
def test_attention_received_equals_plain_softmax(queries):
    rng = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, queries, 2, 4, generator=rng), torch.randn(2, 7, 2, 4, generator=rng)
    found = attention_received(query, key, scale=0.5)
    for b in range(2):
        weights = torch.zeros(7)
        for head in (0, 1):
            for q in query[b, :, head]:
                logits = [math.exp(0.5 * float(q @ k)) for k in key[b, :, head]]
                weights += torch.tensor(logits) / sum(logits)
        torch.testing.assert_close(found[b], weights / (2 * queries), atol=1e-5, rtol=1e-4)


def test_attention_received_leaves_padding_out():
    rng = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 7, 2, 4, generator=rng), torch.randn(2, 7, 2, 4, generator=rng)
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    found = attention_received(query, key, 0.5, mask)
    torch.testing.assert_close(found[1, :4], attention_received(query[1:, :4], key[1:, :4], 0.5)[0])
    assert found[1, 4:].eq(0).all() and torch.equal(found[:1], attention_received(query[:1], key[:1], 0.5))
    added = torch.zeros(2, 1, 7, 7).masked_fill(~mask[:, None, None], -1e30)
    for form in (mask, mask.long(), mask[:, None, None].expand(2, 1, 7, 7), added):
        assert torch.equal(real_keys(form), mask)
    assert real_keys(None) is None


def test_grip_hands_budget_and_question_to_the_scorer():
    selector, batch = build("grip"), join([one_group((9,), budget=3), one_group((4,), budget=9, seed=1)])
    expected = selector.scorer(
        batch.tokens, batch.mask, batch.text, batch.text_mask, torch.tensor([3 / 9, 1.0]), batch.positions
    )
    assert torch.equal(selector(batch), expected.detach()) and not selector(batch).requires_grad


def test_grip_loads_its_scorer(tmp_path):
    selector = build("grip")
    selector.scorer.save_pretrained(tmp_path)
    assert torch.equal(get_selector("grip", scorer=str(tmp_path))(one_group()), selector(one_group()))
    with pytest.raises(ScorerError, match=r"scorer must be a GripScorer .* got int"):
        get_selector("grip", scorer=3)


def test_registry():
    with pytest.raises(ConfigError, match=r"unknown selector 'nope'; known ones are .*'grid'"):
        get_selector("nope")
    with pytest.raises(ConfigError, match=r"selector 'similarity' takes the arguments \['pooling'\]"):
        get_selector("similarity", pool="max")
    with pytest.raises(ConfigError, match="pooling must be 'mean' or 'max', got 'sum'"):
        get_selector("similarity", pooling="sum")
    with pytest.raises(ConfigError, match="registered already"):

        @register("grid")
        class Other(Selector):
            def __call__(self, batch):
                return batch.mask.float()

    assert get_selector("random", seed=7).seed == 7 and SELECTORS["grid"].name == "grid"
