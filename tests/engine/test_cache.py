"""What a cache remembers of pruned calls, against the unpatched model: fillers, rows, compact positions, cropping."""

import pytest
import torch
from asking import generate, prune
from matrix import lacking
from reference import assert_close, held_positions, reference_generate, reference_logits, visual_mask
from tiny import IMAGE, build, join_pictures, make_inputs
from versions import CACHE

from grip_hf import remove_grip

pytestmark = pytest.mark.usefixtures("no_grad")

ALIKE = [[3, IMAGE, 4], [3, IMAGE, 4]]  # nothing is padded before tokens are dropped
UNEQUAL = [0.1, 0.8]  # of one picture each, so that the first row has fillers


def appended(inputs, tokens):
    """Inputs with text tokens [B, T] behind them."""
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, tokens.shape[1]), value=1)
    return {**inputs, "input_ids": torch.cat([inputs["input_ids"], tokens], 1), "attention_mask": mask}


def lengthened(held, tokens):
    return torch.nn.functional.pad(held, (0, tokens.shape[1]), value=True)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3"])
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True}], ids=str)
def test_fillers_stay_hidden_while_decoding(family, options):
    model, inputs = build(family), make_inputs(family, ALIKE)

    def check():
        assert torch.equal(generate(model, inputs, **options).sequences, generate(model, inputs).sequences)

    if options and lacking("static cache", family, check):
        return
    prune(model)
    with model.grip.budget(keep_ratio=UNEQUAL):
        out = generate(model, inputs, **options)
    kept = model.grip.kept_tokens(out)
    assert len(kept[0]) < len(kept[1])
    remove_grip(model)
    tokens, logits = reference_generate(model, inputs, held_positions(inputs, kept), 6)
    assert torch.equal(out.sequences[:, -6:], tokens)
    assert_close(family, torch.stack(out.logits, 1), logits)


def test_fillers_stay_hidden_where_decoding_by_hand_gives_no_mask():
    model, inputs = prune(build("llava")), make_inputs("llava", ALIKE)
    with model.grip.budget(keep_ratio=UNEQUAL):
        cache = model(**inputs, use_cache=True)[CACHE]
    held, tokens = held_positions(inputs, model.grip.kept_tokens(cache)), torch.tensor([[5, 7, 11], [9, 8, 2]])
    found = [model(input_ids=token, **{CACHE: cache}).logits for token in tokens.split(1, 1)]
    remove_grip(model)
    expected = reference_logits(model, appended(inputs, tokens), lengthened(held, tokens))
    assert_close("llava", torch.cat(found, 1), expected[:, -3:])


@pytest.mark.parametrize("way", ["reorder_cache", "batch_select_indices"])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_rows_of_a_cache_take_their_state_along(way, positions):
    """Rows with other numbers of dropped tokens change places, then decode."""
    model, inputs = build("llava"), make_inputs("llava", ALIKE)
    prune(model, keep_ratio=0.5, position_ids=positions)
    with model.grip.budget(keep_ratio=UNEQUAL):
        cache = model(**inputs, use_cache=True)[CACHE]
    held, tokens = held_positions(inputs, model.grip.kept_tokens(cache)), torch.tensor([[5, 7], [9, 8]])
    getattr(cache, way)(torch.tensor([1, 0]))
    swapped = {**inputs, "input_ids": inputs["input_ids"].flip(0), "pixel_values": inputs["pixel_values"].flip(0)}
    found = [model(input_ids=token, **{CACHE: cache}).logits for token in tokens.split(1, 1)]
    remove_grip(model)
    held = lengthened(held.flip(0), tokens)
    where = held.cumsum(1).sub(1).clamp(min=0) if positions == "compact" else None
    expected = reference_logits(model, appended(swapped, tokens), held, where)
    assert_close("llava", torch.cat(found, 1), expected[:, -2:])


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("cut", [0, 2])
def test_a_picture_after_cropping_into_the_prompt(positions, cut):
    """The last words of a prompt are taken back, and a turn with another picture comes in their place."""
    model, first = build("llava"), make_inputs("llava", [[3, IMAGE, 4]])
    prune(model, keep_ratio=0.5, position_ids=positions)
    cache = model(**first, use_cache=True)[CACHE]
    if cut:
        cache.crop(-cut)
    start = first["input_ids"].shape[1] - cut
    assert cache.get_seq_length() == start
    second = make_inputs("llava", [[2, IMAGE, 3]], seed=5)
    ids = torch.cat([first["input_ids"][:, :start], second["input_ids"]], 1)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    turn = {**second, "attention_mask": whole["attention_mask"]}
    out = model(**turn, **{CACHE: cache})
    kept = model.grip.kept_tokens(cache)
    assert len(kept[0]) == int(visual_mask(whole).sum()) // 2
    token = torch.tensor([[7]])
    after = model(input_ids=token, **{CACHE: cache}).logits
    remove_grip(model)
    pictures = [{"pixel_values": one["pixel_values"]} for one in (first, second)]
    whole = {**appended(whole, token), **join_pictures("llava", pictures)}
    held = held_positions(whole, kept)
    where = held.cumsum(1).sub(1).clamp(min=0) if positions == "compact" else None
    expected = reference_logits(model, whole, held, where)
    new = held[:, start:-1]
    assert_close("llava", out.logits[new], expected[:, start:-1][new])
    assert_close("llava", after, expected[:, -1:])
