"""The methods of other papers against plain calculations of their formulas."""

import dataclasses
import math

import numpy as np
import pytest
import tiny
import torch
from batches import MIDDLE, join, one_group, square

from grip_hf import apply_grip
from grip_hf.engine.keepsets import topk_mask
from grip_hf.errors import ConfigError
from grip_hf.selectors import get_selector
from grip_hf.selectors.hiprune import CLIP_DEPTH, PACKED_DEPTH, beside
from grip_hf.selectors.sparsevlm import SparseVLMSelector, raters

SALIENCE, DEEP, FEATURES = "vision.salience", "vision.attention", "vision.features"


def cosine(a, b):
    return float(a @ b) / float((a @ a) * (b @ b)) ** 0.5


def kept(name, batch, **kwargs):
    selector = get_selector(name, **kwargs)
    return [row.nonzero().flatten().tolist() for row in topk_mask(selector(batch), batch.mask, batch.budgets)]


@pytest.mark.parametrize("budget", [1, 4, 9])
def test_cdpruner_picks_what_adds_most_to_the_determinant(budget):
    group = one_group((16,), budget=budget, seed=budget)
    tokens, words = group.tokens[0].double(), group.text[0].double()
    relevance = [sum(cosine(t, w) for w in words) / len(words) for t in tokens]
    low, high = min(relevance), max(relevance)
    relevance = [(r - low + 1e-6) / (high - low + 1e-6) for r in relevance]
    kernel = np.array(
        [[relevance[i] * cosine(tokens[i], tokens[j]) * relevance[j] for j in range(16)] for i in range(16)]
    )
    picks = []
    while len(picks) < budget:
        rest = [i for i in range(16) if i not in picks]
        volumes = [np.linalg.det(kernel[np.ix_([*picks, i], [*picks, i])]) for i in rest]
        picks.append(rest[int(np.argmax(volumes))])
    batch = join([group, one_group((25,), budget=20, seed=3)])
    scores = get_selector("cdpruner")(batch)
    assert scores[0, :16].argsort(descending=True)[:budget].tolist() == picks


def test_cdpruner_without_words_is_plain_diversity():
    """All relevances are equal: the first two picks are the pair with the largest angle among pairs with token 0."""
    group = one_group((16,), words=0, budget=2)
    first, second = get_selector("cdpruner")(group)[0].argsort(descending=True)[:2].tolist()
    angles = [abs(cosine(group.tokens[0, first], t)) for t in group.tokens[0]]
    assert second == int(np.argmin(angles))


def test_hiprune_equals_the_official_loop():
    side, budget = 8, 40
    group = one_group((side * side,), budget=budget)
    shallow, deep = group.taps[MIDDLE][0].tolist(), group.taps[DEEP][0].tolist()
    for alpha in (0.0, 0.1, 0.5, 1.0):
        count = round(budget * alpha / 5)
        chosen = set()
        for anchor in sorted(range(side * side), key=lambda i: -shallow[i])[:count]:
            for near in (anchor, anchor - 1, anchor + 1, anchor - side, anchor + side):
                chosen.add(min(max(near, 0), side * side - 1))
        rest = sorted((i for i in range(side * side) if i not in chosen), key=lambda i: -deep[i])
        expected = sorted([*chosen, *rest[: budget - len(chosen)]])
        assert kept("hiprune", group, alpha=alpha) == [expected]


def test_what_is_beside_an_anchor_knows_images_shapes_and_padding():
    """A picture of 2 x 3 tokens, one of 2 x 2, and padding: index arithmetic within each picture."""
    wide = torch.meshgrid((torch.arange(2) + 0.5) / 2, (torch.arange(3) + 0.5) / 3, indexing="ij")
    positions = torch.cat([torch.stack(wide, -1).reshape(-1, 2), square(2), torch.zeros(2, 2)])[None]
    image = torch.tensor([[0] * 6 + [1] * 4 + [-1] * 2])
    for anchor in range(10):
        start, end, width = (0, 5, 3) if anchor < 6 else (6, 9, 2)
        expected = {min(max(anchor + step, start), end) for step in (-1, 1, -width, width)}
        anchors = torch.zeros(1, 12, dtype=torch.bool)
        anchors[0, anchor] = True
        assert set(beside(anchors, positions, image)[0].nonzero().flatten().tolist()) == expected


def test_hiprune_takes_the_official_layers():
    """Index 8 of CLIP's 24 layers and 15 of the 32 of Qwen2.5-VL, counted from 0."""
    assert int(CLIP_DEPTH * 24) == 8 and int(PACKED_DEPTH * 32) == 15


@pytest.mark.parametrize(("budget", "important"), [(6, 0.5), (5, 0.5), (10, 0.2), (3, 1.0), (2, 0.0), (1, 0.5)])
@pytest.mark.parametrize("total", [64, 49])
def test_vispruner_equals_the_official_loop(budget, important, total):
    group = one_group((total,), budget=budget, seed=budget)
    salience, features = group.taps[SALIENCE][0].tolist(), group.taps[FEATURES][0].double()
    by_attention = sorted(range(total), key=lambda i: -salience[i])
    first, left = by_attention[: int(budget * important)], by_attention[int(budget * important) :]
    wanted = budget - len(first)
    while len(left) > wanted:
        one, other = left[0::2], left[1::2]
        double = {i: max((cosine(features[i], features[j]) for j in other), default=0) for i in one}
        ranked = sorted(one, key=lambda i: -double[i])
        left = ranked[min(8, len(left) - wanted, len(one)) :] + other
    assert kept("vispruner", group, important=important) == [sorted(first + left)]
    without = dataclasses.replace(group, taps={SALIENCE: group.taps[SALIENCE]})
    same = dataclasses.replace(group, taps={SALIENCE: group.taps[SALIENCE], FEATURES: group.tokens})
    assert kept("vispruner", without) == kept("vispruner", same)  # projected tokens stand in for features


@pytest.mark.parametrize("relevance", ["mean", "max"])
@pytest.mark.parametrize("budget", [1, 4, 9])
def test_cdpruner_relevance_by_all_words_or_the_best(budget, relevance):
    group = one_group((16,), budget=budget, words=5, seed=budget)
    tokens, words = group.tokens[0].double(), group.text[0].double()
    pool = {"mean": np.mean, "max": max}[relevance]
    raw = [float(pool([cosine(t, w) for w in words])) for t in tokens]
    scaled = [(r - min(raw) + 1e-6) / (max(raw) - min(raw) + 1e-6) for r in raw]
    unit = torch.stack([t / t.norm() * r for t, r in zip(tokens, scaled, strict=True)]).numpy()
    picks = []
    while len(picks) < budget:
        rest = [i for i in range(16) if i not in picks]
        volumes = [np.linalg.det(unit[[*picks, i]] @ unit[[*picks, i]].T) for i in rest]
        picks.append(rest[int(np.argmax(volumes))])
    assert kept("cdpruner", group, relevance=relevance) == [sorted(picks)]
    if relevance == "max":
        assert kept("cdpruner_max", group) == [sorted(picks)]


def softmax(values, temperature):
    powers = [math.exp(value / temperature) for value in values]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("budget", [1, 5, 16, 36])
@pytest.mark.parametrize("words", [0, 1, 4])
def test_mmtok_equals_the_official_loop(budget, words):
    group = one_group((36,), budget=budget, words=words, seed=budget)
    tokens, text, features = group.tokens[0].double(), group.text[0].double(), group.taps[FEATURES][0].double()
    rows = [[share / words for share in softmax([cosine(w, t) for t in tokens], 0.02)] for w in text]
    rows += [[0.5 * share / 36 for share in softmax([cosine(f, g) for g in features], 0.2)] for f in features]
    best, picks = [0.0] * len(rows), []
    for _ in range(budget):
        gain = {j: sum(max(row[j] - b, 0) for row, b in zip(rows, best, strict=True)) for j in range(36)}
        picks.append(max((j for j in range(36) if j not in picks), key=lambda j: gain[j]))
        best = [max(b, row[picks[-1]]) for row, b in zip(rows, best, strict=True)]
    batch = join([group, one_group((49,), budget=30, words=2, seed=3)])
    scores = get_selector("mmtok")(batch)
    assert scores[0, :36].argsort(descending=True)[:budget].tolist() == picks
    assert kept("mmtok", batch)[0] == kept("mmtok", group)[0]


def test_mmtok_asks_with_the_words_behind_the_picture():
    """Two words before it, three behind: those before do not count, unless there are no others."""
    group = one_group((36,), budget=6, words=5, seed=2)
    places = dataclasses.replace(
        group, text_index=torch.tensor([[0, 1, 38, 39, 40]]), token_index=torch.arange(2, 38)[None]
    )
    behind = dataclasses.replace(group, text=group.text[:, 2:], text_mask=group.text_mask[:, 2:])
    assert kept("mmtok", places) == kept("mmtok", behind) != kept("mmtok", group)
    before = dataclasses.replace(places, text_index=torch.arange(5)[None], token_index=torch.arange(5, 41)[None])
    assert kept("mmtok", before) == kept("mmtok", group)


@pytest.mark.parametrize("budget", [1, 5, 16, 36])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_scope_equals_the_official_loop(budget, power):
    group = one_group((36,), budget=budget, seed=budget)
    salience, features = group.taps[SALIENCE][0].tolist(), group.taps[FEATURES][0].double()
    similar = [[cosine(f, g) for g in features] for f in features]
    covered, picks = [0.0] * 36, []
    for _ in range(budget):
        gain = {j: sum(max(similar[i][j] - covered[i], 0) for i in range(36)) for j in range(36) if j not in picks}
        picks.append(max(gain, key=lambda j: gain[j] * salience[j] ** power))
        covered = [max(covered[i], similar[i][picks[-1]]) for i in range(36)]
    batch = join([group, one_group((49,), budget=30, seed=3)])
    scores = get_selector("scope", power=power)(batch)
    assert scores[0, :36].argsort(descending=True)[:budget].tolist() == picks


def test_raters_are_words_that_draw_more_than_the_mean():
    group = one_group((16,), words=6, seed=4)
    may = torch.tensor([[False, False, True, True, True, True]])  # two words stand before the picture
    drawn = [0.0] * 4
    for token in group.tokens[0].double():
        powers = [math.exp(float(token @ word)) for word in group.text[0, 2:].double()]
        drawn = [d + power / sum(powers) for d, power in zip(drawn, powers, strict=True)]
    expected = [i + 2 for i in range(4) if drawn[i] > sum(drawn) / 4]
    assert 0 < len(expected) < 4
    found = raters(group.tokens, group.mask, group.text, may)
    assert found[0].nonzero().flatten().tolist() == expected
    alone = torch.tensor([[True] + [False] * 5])
    assert not raters(group.tokens, group.mask, group.text, alone).any()


def test_sparsevlm_ranks_where_the_paper_does_and_never_before_fastv():
    assert SparseVLMSelector().stages(32) == [(2, 3), (6, 7), (15, 16)]
    assert SparseVLMSelector().stages(4) == [(1, 2)] == get_selector("fastv").stages(4)


@pytest.mark.parametrize(
    ("name", "kwargs", "said"),
    [
        ("cdpruner", {"relevance": "sum"}, "relevance must be 'mean' or 'max', got 'sum'"),
        ("mmtok", {"alpha": -1}, "alpha must be a number >= 0, got -1"),
        ("mmtok", {"word_temperature": 0}, "word_temperature must be a number > 0, got 0"),
        ("scope", {"power": -0.5}, "power must be a number >= 0, got -0.5"),
    ],
)
def test_bad_arguments_are_named(name, kwargs, said):
    with pytest.raises(ConfigError, match=said):
        get_selector(name, **kwargs)


@pytest.mark.parametrize(("name", "kwargs"), [("vispruner", {"important": 1.5}), ("hiprune", {"alpha": -0.1})])
def test_bad_shares_are_refused(name, kwargs):
    with pytest.raises(ConfigError, match=r"must be a number in \[0, 1\], got"):
        get_selector(name, **kwargs)


def test_cdpruner_is_stable_where_tokens_span_little():
    """More picks than dimensions: the rest adds no volume, and rounding must not choose."""
    group = one_group((36,), budget=30)
    flat = dataclasses.replace(group, tokens=torch.cat([group.tokens[..., :3], torch.zeros(1, 36, 9)], -1))
    noisy = dataclasses.replace(flat, tokens=flat.tokens * (1 + 1e-7 * torch.randn(flat.tokens.shape)))
    assert kept("cdpruner", flat) == kept("cdpruner", noisy)


@pytest.mark.parametrize("family", ["llava", "internvl", "qwen2_5_vl", "smolvlm"])
@pytest.mark.parametrize("name", ["vispruner", "scope", "mmtok"])
def test_features_are_the_towers_where_a_token_is_a_patch_else_the_projected_tokens(family, name):
    model, seen = tiny.build(family), {}
    selector = get_selector(name)
    original = type(selector).__call__

    class Spy(type(selector)):
        name = "spy"

        def __call__(self, batch):
            seen["taps"] = batch.taps
            return original(self, batch)

    apply_grip(model, selector=Spy(), num_tokens=3)
    with torch.no_grad():
        kept_tokens = model.grip.kept_tokens(model(**tiny.make_inputs(family, [[3, tiny.IMAGE, 4]])))
    assert len(kept_tokens[0]) == 3 and (FEATURES in seen["taps"]) == (family == "llava")
