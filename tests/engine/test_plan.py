"""plan.py, masks.py, the grouping of keepsets.py and the budgets of context.py against plain-python loops."""

import pytest
import torch

from grip_hf.config import count_kept
from grip_hf.engine.arguments import compact_positions
from grip_hf.engine.budget import Budget
from grip_hf.engine.choice import counts_of
from grip_hf.engine.keepsets import group_tokens, spread_taps
from grip_hf.engine.masks import KeyMap, Window, causal_4d, mask_2d, mask_4d
from grip_hf.engine.plan import expand, grow_output, growth, identity_plan, make_plan, source_slots, take, take_last
from grip_hf.engine.reading import keeps_apart
from grip_hf.errors import ConfigError, GripError


def random_keep(seed, batch=3, length=9):
    keep = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.6
    keep[:, -1] = True
    return keep


@pytest.mark.parametrize("seed", range(20))
def test_plan_and_expansion(seed):
    keep = random_keep(seed)
    plan = make_plan(keep)
    kept = [row.nonzero().flatten().tolist() for row in keep]
    most = max(map(len, kept))
    assert plan.index.shape == plan.valid.shape == (3, most) and plan.length == 9
    assert plan.full == all(len(row) == most for row in kept)
    for row, places in enumerate(kept):
        assert plan.index[row][plan.valid[row]].tolist() == places
        assert plan.valid[row].tolist() == [False] * (most - len(places)) + [True] * len(places)  # fillers on the left
    hidden = torch.randn(3, 9, 2)
    grown = expand(take(hidden, plan.index), source_slots(plan))
    for row, places in enumerate(kept):
        for place in range(9):
            earlier = [one for one in places if one <= place]
            assert torch.equal(grown[row, place], hidden[row, earlier[-1] if earlier else places[0]])


def test_identity_plan_changes_nothing():
    plan, values = identity_plan(2, 5, torch.device("cpu")), torch.randn(2, 5, 3)
    assert plan.full and torch.equal(take(values, plan.index), values)
    assert torch.equal(expand(values, source_slots(plan)), values)


def test_last_rows_of_an_output_must_be_the_last_of_the_call():
    """Some models return only the rows that `logits_to_keep` asks for."""
    keep = torch.tensor([[1, 0, 1, 1, 0, 1, 1]]).bool()
    plan = make_plan(keep)
    grown = {0: growth(plan, KeyMap(plan.index, plan.valid, plan.full), 7)}
    output = (torch.randn(1, 2, 4),)
    assert grow_output(output, plan, grown, between=False) is output
    with pytest.raises(GripError, match="returned its last 3 positions, some of which were dropped"):
        grow_output((torch.randn(1, 3, 4),), plan, grown, between=False)


@pytest.mark.parametrize("shape", [(9,), (1, 9), (3, 9), (3, 1, 9), (4, 3, 9)])
def test_take_last_takes_every_form_of_positions(shape):
    values, index = torch.randn(shape), make_plan(random_keep(0)).index
    taken = take_last(values, index)
    full = values.expand(*shape[:-2], 3, 9) if len(shape) > 1 else values.expand(3, 9)
    for row in range(3):
        assert torch.equal(taken[..., row, :], full[..., row, :][..., index[row]])


def test_compact_positions_close_the_gaps():
    keep = torch.tensor([[0, 1, 0, 0, 1, 1], [1, 1, 0, 1, 1, 1]]).bool()
    real = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()  # one padded position counts for nothing
    positions = torch.tensor([[0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]])
    new = compact_positions(positions, keep, real)
    assert new[0, keep[0]].tolist() == [0, 1, 2] and new[1, keep[1]].tolist() == [0, 1, 2, 3, 4]


def key_map(seed, batch=2, logical=10):
    plan = make_plan(random_keep(seed, batch, logical))
    return KeyMap(plan.index, plan.valid, plan.full)


@pytest.mark.parametrize("seed", range(8))
def test_masks_pick_the_rows_and_columns_of_what_stays(seed):
    keys = key_map(seed)
    total = keys.index.shape[1]
    padding = (torch.rand(2, 10, generator=torch.Generator().manual_seed(seed)) < 0.8).long()
    flat = mask_2d(padding, keys)
    queries = keys.index[:, -3:] - 4  # local to a call that starts after 4 logical positions
    seen = torch.rand(2, 1, 6, 10, generator=torch.Generator().manual_seed(seed + 100)) < 0.5
    free = 2  # a static cache has columns that nothing lies in yet
    picked = mask_4d(seen, queries.clamp(min=0), keys, Window(10, 0), Window(total + free, 0))
    additive = torch.zeros(seen.shape).masked_fill(~seen, -9.0)
    added = mask_4d(additive, queries.clamp(min=0), keys, Window(10, 0), Window(total + free, 0))
    for row in range(2):
        for slot in range(total):
            valid = bool(keys.valid[row, slot])
            place = int(keys.index[row, slot])
            assert flat[row, slot] == (padding[row, place] if valid else 0)
            for query in range(3):
                line = max(0, int(queries[row, query]))
                assert bool(picked[row, 0, query, slot]) == (valid and bool(seen[row, 0, line, place]))
                expected = additive[row, 0, line, place] if valid else torch.finfo(torch.float).min
                assert added[row, 0, query, slot] == expected
    assert not picked[..., total:].any() and (added[..., total:] == torch.finfo(torch.float).min).all()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("reach", [None, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_causal_mask_from_scratch(seed, reach, packed):
    keys = key_map(seed)
    total, queries, window = keys.index.shape[1], 3, Window(keys.index.shape[1], 1)
    segments = torch.arange(total).expand(2, -1) // 3 if packed else None
    mask = causal_4d(keys, queries, window, segments, reach)
    additive = causal_4d(keys, queries, window, segments, reach, torch.float32)
    assert mask.shape == (2, 1, queries, window.length)
    assert torch.equal(additive == 0, mask) and (additive[~mask] == torch.finfo(torch.float).min).all()
    for row in range(2):
        for query in range(queries):
            mine = total - queries + query
            for column in range(window.length):
                slot = column + window.offset
                seen = slot <= mine and bool(keys.valid[row, slot])
                if seen and packed:
                    seen = slot // 3 == mine // 3
                if seen and reach:
                    seen = bool(keys.index[row, slot] > keys.index[row, mine] - reach)
                assert bool(mask[row, 0, query, column]) == seen


def test_whether_a_mask_keeps_packed_rows_apart():
    """Two sequences of a row, of 3 and 4 tokens; sliding layers see 2 positions."""
    number, reach = [0, 0, 0, 1, 1, 1, 1], 2
    segments = torch.tensor([number])

    def mask(see):
        return torch.tensor([[[[see(q, k) for k in range(7)] for q in range(7)]]])

    apart = mask(lambda q, k: k <= q and number[k] == number[q])
    whole = mask(lambda q, k: k <= q)
    window = mask(lambda q, k: q - reach < k <= q and number[k] == number[q])
    shifted = mask(lambda q, k: (q - reach < k <= q and number[k] == number[q]) or (q, k) == (4, 5))
    additive = torch.zeros(apart.shape).masked_fill(~apart, torch.finfo(torch.float).min)
    assert keeps_apart(apart, segments, None) and keeps_apart(additive, segments, None)
    assert keeps_apart({"full_attention": apart, "sliding_attention": window}, segments, reach)
    assert not keeps_apart(whole, segments, None) and not keeps_apart(apart[..., :5], segments, None)
    for sliding in (mask(lambda q, k: q - reach < k <= q), shifted, None):
        assert not keeps_apart({"full_attention": apart, "sliding_attention": sliding}, segments, reach)


@pytest.mark.parametrize("seed", range(10))
def test_groups_of_samples_and_images(seed):
    generator = torch.Generator().manual_seed(seed)
    visual = torch.rand(4, 12, generator=generator) < 0.5
    visual[1] = False
    image = torch.randint(0, 3, (4, 12), generator=generator)
    values = torch.randn(4, 12, 2, generator=generator)
    for labels in (None, image):
        groups = group_tokens(visual, labels)
        expected = []
        for row in range(4):
            for one in [None] if labels is None else sorted(set(labels[row, visual[row]].tolist())):
                places = [c for c in range(12) if visual[row, c] and (one is None or labels[row, c] == one)]
                expected += [(row, places)] if places else []
        found = zip(groups.row.tolist(), groups.place, groups.mask, strict=True)
        assert [(row, place[mask].tolist()) for row, place, mask in found] == expected
        picked = groups.pick(values)
        for group, (row, places) in enumerate(expected):
            assert torch.equal(picked[group, : len(places)], values[row, places])
            assert not picked[group, len(places) :].any()
        keep = torch.rand(groups.mask.shape, generator=generator) < 0.5
        scattered = groups.scatter(keep, visual)
        for group, (row, places) in enumerate(expected):
            assert scattered[row, places].tolist() == keep[group, : len(places)].tolist()
        assert not scattered[~visual].any()


def test_taps_follow_the_tokens_also_when_repeated_for_beams():
    visual = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]]).bool()
    tap = torch.tensor([10, 11, 12, 20])
    assert spread_taps(tap, visual, "t").tolist() == [[10, 0, 11, 12], [0, 20, 0, 0]]
    repeated = visual.repeat_interleave(2, 0)
    assert torch.equal(spread_taps(tap, repeated, "t"), spread_taps(tap, visual, "t").repeat_interleave(2, 0))
    with pytest.raises(GripError, match="tap 't' has 3 rows for 4 visual tokens"):
        spread_taps(tap[:3], visual, "t")
    with pytest.raises(GripError, match="evenly"):
        spread_taps(tap[:2], visual, "t")


def test_budgets_count_per_group():
    def never(times):
        return False

    def counts(budget, totals, rows, batch, repeated):
        return counts_of(budget, torch.tensor(totals), torch.tensor(rows), batch, repeated).tolist()

    assert counts(Budget(keep_ratio=0.5), [4, 5, 1], [0, 1, 2], 3, never) == [2, 3, 1]
    assert counts(Budget(num_tokens=(1, 9)), [4, 4, 4], [0, 0, 1], 2, bool) == [1, 1, 4]
    beams = counts(Budget(num_tokens=(1, 2)), [4] * 4, [0, 1, 2, 3], 4, lambda times: times == 2)
    assert beams == [1, 1, 2, 2]
    with pytest.raises(ConfigError, match="num_tokens has 2 values for a batch of 4"):  # four samples of their own
        counts(Budget(num_tokens=(1, 2)), [4] * 4, [0, 1, 2, 3], 4, never)
    assert counts(Budget(everything=True), [4, 2], [0, 1], 2, never) == [4, 2]
    with pytest.raises(ConfigError, match="num_tokens has 2 values for a batch of 3"):
        counts(Budget(num_tokens=(1, 2)), [4], [0], 3, never)
    ratios, totals = [0.01, 0.11, 1 / 3, 0.145, 0.5, 0.999, 1.0], list(range(1, 700))
    for ratio in ratios:
        wanted = [count_kept(total, ratio) for total in totals]
        assert counts(Budget(keep_ratio=ratio), totals, [0] * len(totals), 1, never) == wanted
    for bad in ([], [0.5, 0], [True], "half"):
        with pytest.raises(ConfigError, match="keep_ratio"):
            Budget.checked(keep_ratio=bad)
