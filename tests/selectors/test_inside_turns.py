"""Pictures in a later turn on one cache, for selectors that drop between layers: against the masked model."""

import pytest
import torch
from layered import BUDGET, DEPTH, METHODS, assert_close, build_deep, dropped, masked_run, patched
from matrix import every_family, limits
from reference import lengthen_types, original_positions
from tiny import IMAGE, IMAGE_ID, TINY, join_pictures, make_inputs
from transformers import StaticCache
from versions import CACHE

from grip_hf import apply_grip
from grip_hf.engine.upstream import sliding_window
from grip_hf.errors import GripError

# Two turns of each row: the second begins with what was answered, and brings another picture.
ROWS = [[3, IMAGE, 4, 5, IMAGE, 6], [2, IMAGE, 9, 1, IMAGE, 3]]
# Families whose later calls on a cache are not those of the whole, without a patch either, or that drop nothing.
WITHOUT = {*limits("later turns"), *limits("drops between layers")}
# Whose pictures see those of later turns in one prompt, so that the whole is no reference for the turns.
SEE_AHEAD = {"molmo2"}


def two_rows():
    """LLaVA: both turns of two rows of unequal lengths, from one padded batch."""
    inputs = make_inputs("llava", ROWS)
    visual = inputs["input_ids"] == IMAGE_ID
    start = int(visual[0].nonzero()[int(visual[0].sum()) // 2 - 1]) + 4  # some words after the first picture
    assert not visual[:, start - 1 : start + 1].any()
    pictures = inputs["pixel_values"].unflatten(0, (-1, 2))
    return inputs, [({"pixel_values": pictures[:, turn]}, first) for turn, first in ((0, 0), (1, start))]


def one_row(family):
    """Any family: the second turn's inputs behind those of the first one."""
    parts = [make_inputs(family, [prompt], seed=seed) for seed, prompt in enumerate([[3, IMAGE, 4], [5, IMAGE, 6]])]
    text = ["input_ids", "attention_mask", *(name for name in parts[0] if "type_ids" in name)]
    inputs = {name: torch.cat([one[name] for one in parts], 1) for name in text}
    pictures = [{name: one[name] for name in one if name not in text} for one in parts]
    if TINY[family].stacked:
        inputs["pixel_values"] = torch.cat([one["pixel_values"] for one in pictures], 1)
    else:
        inputs.update(join_pictures(family, pictures))
    return inputs, list(zip(pictures, (0, parts[0]["input_ids"].shape[1]), strict=True))


def turns_of(family):
    """The whole conversation, the calls that make it up with where each begins, and the positions of all."""
    inputs, given = two_rows() if family == "llava" else one_row(family)
    positions, calls = original_positions(build_deep(family), inputs), []
    ends = [first for _, first in given[1:]] + [inputs["input_ids"].shape[1]]
    for (pictures, first), last in zip(given, ends, strict=True):
        call = {
            name: value[:, first:last] for name, value in inputs.items() if "type_ids" in name or name == "input_ids"
        }
        call |= {"attention_mask": inputs["attention_mask"][:, :last], "position_ids": positions[..., first:last]}
        calls.append(({**call, **pictures}, first))
    return inputs, calls, positions


def unpatched_turns(family, inputs, calls, positions):
    """Fails unless the unpatched model says the same in turns as of the whole."""
    model, cache, logits = build_deep(family), None, []
    for call, _ in calls:
        out = model(**call, use_cache=True, **({} if cache is None else {CACHE: cache}))
        cache = out[CACHE]
        logits.append(out.logits)
    assert_close(family, torch.cat(logits, 1), model(**inputs, position_ids=positions, use_cache=False).logits)


def watch(selector, seen):
    """Remembers, per group, whose attention ranks; no place of its own stands for the last token."""

    def asking(batch):
        named = type(selector).asking(selector, batch)
        named = torch.zeros_like(batch.text_mask) if named is None else named & batch.text_mask
        seen.append([batch.text_index[group, one].tolist() for group, one in enumerate(named)])
        return named

    selector.asking = asking


@every_family(fast=("llava", "qwen3_vl"), without=WITHOUT)
@pytest.mark.parametrize(("name", "attention"), [*((name, "sdpa") for name in sorted(METHODS)), ("fastv", "eager")])
def test_a_picture_in_a_later_turn(name, family, attention, no_grad):
    inputs, calls, positions = turns_of(family)
    if family in SEE_AHEAD:
        with pytest.raises(AssertionError):
            unpatched_turns(family, inputs, calls, positions)
        return
    model, seen, cache, logits = patched(family, name, attention), [], None, []
    watch(model.grip.selector, seen)
    if sliding_window(model.config.get_text_config()) is not None:
        cache = model(**calls[0][0], use_cache=True)[CACHE]
        with pytest.raises(GripError, match="sliding windows"):
            model(**calls[1][0], **{CACHE: cache})
        return
    for call, _ in calls:
        out = model(**call, use_cache=True, **({} if cache is None else {CACHE: cache}))
        cache = out[CACHE]
        logits.append(out.logits)
    plain, gone, total = build_deep(family, "eager"), None, 0
    for (call, first), asked in zip(calls, seen, strict=True):
        length = call["input_ids"].shape[1]
        places = [(first + (ids == IMAGE_ID).nonzero().flatten()).tolist() for ids in call["input_ids"]]
        asking = [[first + place for place in mine] or [first + length - 1] for mine in asked]
        gone = dropped(plain, inputs, name, list(enumerate(places)), asking, gone)
        total += sum(len(one) - BUDGET for one in places)
    assert all(int(one.sum()) for one in gone.values())
    expected = masked_run(plain, inputs, gone, positions).logits
    there = inputs["attention_mask"].bool() & ~max(gone.items())[1]
    assert int(max(gone.items())[1].sum()) == total
    assert_close(family, torch.cat(logits, 1)[there], expected[there])
    # And a word after it, on the same cache.
    word = torch.full((len(there), 1), 33)
    more = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    place = positions.amax((0, -1) if positions.ndim == 3 else -1) + 1
    place = place[:, None].expand(*positions.shape[:-1], 1)
    call = {"input_ids": word, "attention_mask": more, "position_ids": place, CACHE: cache}
    found = model(**call).logits[:, -1]
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], word], 1), "attention_mask": more}
    lengthen_types(family, whole, 1)
    gone = {first: torch.nn.functional.pad(one, (0, 1)) for first, one in gone.items()}
    right = masked_run(plain, whole, gone, torch.cat([positions, place], -1)).logits[:, -1]
    assert_close(family, found, right)


def test_another_patch_between_the_turns(no_grad, monkeypatch):
    """The first turn's tokens are gone from a later layer on than those of the second one."""
    inputs, calls, positions = turns_of("llava")
    plain, model, gone, cache, total = build_deep("llava", "eager"), None, None, None, 0
    for (call, first), rule in zip(calls, (({"layers": 4}, (3, 4)), ({"layers": 2}, (1, 2))), strict=True):
        monkeypatch.setitem(METHODS, "fastv", (rule[0], {DEPTH: [rule[1]]}))
        if model is None:
            model = patched("llava", "fastv")
        apply_grip(model, selector="fastv", selector_kwargs=rule[0], num_tokens=BUDGET)
        out = model(**call, use_cache=True, **({} if cache is None else {CACHE: cache}))
        cache, last = out[CACHE], first + call["input_ids"].shape[1] - 1
        places = [(first + (ids == IMAGE_ID).nonzero().flatten()).tolist() for ids in call["input_ids"]]
        gone = dropped(plain, inputs, "fastv", list(enumerate(places)), [[last]] * len(places), gone)
        total += sum(len(one) - BUDGET for one in places)
    assert sorted(gone) == [2, 4] and int((gone[2] | gone[4]).sum()) == total
    there = (inputs["attention_mask"].bool() & ~gone[2] & ~gone[4])[:, calls[1][1] :]
    expected = masked_run(plain, inputs, gone, positions).logits[:, calls[1][1] :]
    assert_close("llava", out.logits[there], expected[there])
    word = torch.full((len(there), 1), 33)
    more = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    place = positions.amax(-1, keepdim=True) + 1
    found = model(input_ids=word, attention_mask=more, position_ids=place, **{CACHE: cache}).logits[:, -1]
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], word], 1), "attention_mask": more}
    gone = {first: torch.nn.functional.pad(one, (0, 1)) for first, one in gone.items()}
    right = masked_run(plain, whole, gone, torch.cat([positions, place], -1)).logits[:, -1]
    assert_close("llava", found, right)


def test_caches_whose_keys_have_no_plain_order_are_refused(no_grad):
    _, calls, _ = turns_of("llava")
    model = patched("llava", "fastv")
    cache = StaticCache(config=model.config, max_cache_len=96)
    model(**calls[0][0], **{CACHE: cache})
    with pytest.raises(GripError, match="static cache"):
        model(**calls[1][0], **{CACHE: cache})
    assert len(model.get_decoder().layers) == DEPTH
