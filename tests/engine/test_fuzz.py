"""Random prompts, pictures, paddings, budgets and cache histories against the independent reference."""

import copy
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import LOOSE, held_positions, lengthen_types, positions_and_next, reference_logits
from tiny import IMAGE, IMAGE_ID, build, make_inputs, select_by_content
from transformers import StaticCache
from versions import CACHE, faults

from grip_hf import apply_grip, remove_grip

# Plain, M-RoPE, tiles, windows, masks made outside, M-RoPE with deepstack, recurrent layers, newlines among tokens.
FAMILIES = ["llava", "qwen2_vl", "internvl", "cohere2_vision", "gemma3", "qwen3_vl", "lfm2_vl", "qwen3_5"]
FAMILIES += ["llava_next"]
_models = {}


def model_of(family, attention):
    if (family, attention) not in _models:
        _models[family, attention] = build(family, attention)
    return _models[family, attention]


prompt = st.lists(st.one_of(st.integers(1, 4), st.just(IMAGE)), min_size=1, max_size=4).map(
    lambda parts: [1, *parts, 2]
)
budget = st.one_of(
    st.floats(0.05, 1.0).map(lambda ratio: {"keep_ratio": ratio}), st.integers(1, 20).map(lambda n: {"num_tokens": n})
)


step = st.one_of(st.integers(1, 3), st.sampled_from(["copy", "pickle", "reorder"]))
calls = given(
    attention=st.sampled_from(["eager", "sdpa"]),
    prompts=st.lists(prompt, min_size=1, max_size=3),
    budget=budget,
    scope=st.sampled_from(["sample", "image"]),
    static=st.booleans(),
    history=st.lists(step, max_size=5),
)
steadily = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=6, **steadily)
@calls
def test_any_call_equals_the_masked_model(family, **drawn):
    check(family, **drawn)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, **steadily)
@calls
def test_many_calls_equal_the_masked_model(family, **drawn):
    check(family, **drawn)


def check(family, attention, prompts, budget, scope, static, history):
    """A pruned prefill; then text tokens on its cache, which is copied, pickled and re-ordered on the way."""
    prompts = [*prompts, [2, IMAGE, 1]]  # at least one picture
    model, inputs = model_of(family, attention), make_inputs(family, prompts)
    more = sum(one for one in history if isinstance(one, int))
    positions = positions_and_next(model, inputs, more)
    length = inputs["input_ids"].shape[1]
    ids = torch.cat([inputs["input_ids"], torch.full((len(prompts), more), 7)], 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, more), value=1)
    static = static and not faults("static cache", family)
    cache = StaticCache(config=model.config, max_cache_len=length + more) if static else None
    try:
        apply_grip(model, selector=select_by_content, scope=scope, **budget)
        with torch.no_grad():
            out = model(**inputs, position_ids=positions[..., :length], **{CACHE: cache}, use_cache=True)
            kept, cache = model.grip.kept_tokens(out), out[CACHE]
            logits, end, rows = [out.logits], length, torch.arange(len(prompts))
            for one in history:
                if one == "copy":
                    cache = copy.deepcopy(cache)
                elif one == "pickle":
                    cache = pickle.loads(pickle.dumps(cache))
                elif one == "reorder":
                    cache.reorder_cache(torch.arange(len(rows)).flip(0))
                    rows = rows.flip(0)
                else:
                    now = slice(end, end + one)
                    call = {"input_ids": ids[rows, now], "attention_mask": mask[rows, : end + one]}
                    call["position_ids"] = positions[..., rows, now]
                    logits.append(model(**call, **{CACHE: cache}).logits[rows.argsort()])
                    end += one
    finally:
        remove_grip(model)
    held = torch.nn.functional.pad(held_positions(inputs, kept), (0, more), value=True)
    full = {**inputs, "input_ids": ids}
    lengthen_types(family, full, more)
    expected = reference_logits(model, full, held, positions)
    atol = LOOSE.get(family, 5e-5)
    torch.testing.assert_close(torch.cat(logits, 1)[held], expected[held], atol=atol, rtol=1e-3)
    if scope == "sample":
        for one, row in zip(kept, inputs["input_ids"] == IMAGE_ID, strict=True):
            total = int(row.sum())
            ratio = budget.get("keep_ratio")
            wanted = min(total, budget["num_tokens"]) if ratio is None else max(1, int(total * ratio + 0.5))
            assert len(one) == (wanted if total else 0)
