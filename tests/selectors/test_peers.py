"""The methods of other papers against plain calculations of their formulas."""

import dataclasses

import numpy as np
import pytest
import torch
from batches import join, one_group, square

from grip_hf.engine.keepsets import topk_mask
from grip_hf.errors import ConfigError
from grip_hf.selectors import get_selector
from grip_hf.selectors.hiprune import neighbours

SALIENCE, DEEP, MIDDLE = "vision.salience", "vision.attention", "vision.attention.0.375"


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


def test_hiprune_equals_a_walk_over_the_grid():
    side, budget = 8, 40
    group = one_group((side * side,), budget=budget)
    shallow, deep = group.taps[MIDDLE][0].tolist(), group.taps[DEEP][0].tolist()
    for alpha in (0.0, 0.1, 0.5, 1.0):
        count = round(budget * alpha / 5)
        anchors = sorted(range(side * side), key=lambda i: -shallow[i])[:count]
        chosen = set(anchors)
        for anchor in anchors:
            row, column = divmod(anchor, side)
            for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                if 0 <= r < side and 0 <= c < side:
                    chosen.add(r * side + c)
        rest = sorted((i for i in range(side * side) if i not in chosen), key=lambda i: -deep[i])
        expected = sorted([*chosen, *rest[: budget - len(chosen)]])
        assert kept("hiprune", group, alpha=alpha) == [expected]


def test_neighbours_know_images_and_shapes():
    lines = torch.meshgrid((torch.arange(2) + 0.5) / 2, (torch.arange(3) + 0.5) / 3, indexing="ij")
    positions = torch.cat([torch.stack(lines, -1).reshape(-1, 2), square(1)])[None]
    image = torch.tensor([[0] * 6 + [1]])
    found = neighbours(positions, image, torch.ones(1, 7, dtype=torch.bool))[0]
    pairs = {(i, j) for i, j in found.nonzero().tolist() if i < j}
    assert pairs == {(0, 1), (1, 2), (3, 4), (4, 5), (0, 3), (1, 4), (2, 5)}


@pytest.mark.parametrize(("budget", "important"), [(6, 0.5), (5, 0.5), (10, 0.2), (3, 1.0), (2, 0.0)])
def test_vispruner_equals_plain_loops(budget, important):
    group = one_group((49,), budget=budget, seed=budget)
    salience, tokens = group.taps[SALIENCE][0].tolist(), group.tokens[0].double()
    first = sorted(range(49), key=lambda i: -salience[i])[: int(budget * important)]
    left = [i for i in range(49) if i not in first]
    while len(left) > budget - len(first):
        one, other = left[0::2], left[1::2]
        double = {i: max((cosine(tokens[i], tokens[j]) for j in other), default=0) for i in one}
        number = min(8, len(left) - (budget - len(first)), len(one))
        gone = sorted(one, key=lambda i: -double[i])[:number]
        left = [i for i in left if i not in gone]
    assert kept("vispruner", group, important=important) == [sorted(first + left)]


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
