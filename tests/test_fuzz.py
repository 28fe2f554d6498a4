"""Random prompts, pictures, paddings, budgets and cache histories against the independent reference."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import held_positions, lengthen_types, positions_and_next, reference_logits
from tiny import IMAGE, build, make_inputs, select_by_content

from grip_hf import apply_grip, remove_grip

FAMILIES = ["llava", "qwen2_vl", "internvl", "cohere2_vision", "gemma3"]
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


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    family=st.sampled_from(FAMILIES),
    attention=st.sampled_from(["eager", "sdpa"]),
    prompts=st.lists(prompt, min_size=1, max_size=3),
    budget=budget,
    scope=st.sampled_from(["sample", "image"]),
    segments=st.lists(st.integers(1, 3), max_size=3),
)
def test_any_call_equals_the_masked_model(family, attention, prompts, budget, scope, segments):
    """A pruned prefill, then segments of one or more text tokens on its cache."""
    prompts = [*prompts, [2, IMAGE, 1]]  # at least one picture
    model, inputs = model_of(family, attention), make_inputs(family, prompts)
    positions = positions_and_next(model, inputs, sum(segments))
    length = inputs["input_ids"].shape[1]
    ids = torch.cat([inputs["input_ids"], torch.full((len(prompts), sum(segments)), 7)], 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, sum(segments)), value=1)
    try:
        apply_grip(model, selector=select_by_content, scope=scope, **budget)
        with torch.no_grad():
            out = model(**inputs, position_ids=positions[..., :length], use_cache=True)
            logits, end = [out.logits], length
            for size in segments:
                step = {"input_ids": ids[:, end : end + size], "attention_mask": mask[:, : end + size]}
                step["position_ids"] = positions[..., end : end + size]
                logits.append(model(**step, past_key_values=out.past_key_values).logits)
                end += size
            kept = model.grip.kept_tokens(out)
    finally:
        remove_grip(model)
    held = torch.nn.functional.pad(held_positions(inputs, kept), (0, sum(segments)), value=True)
    full = {**inputs, "input_ids": ids}
    lengthen_types(family, full, sum(segments))
    expected = reference_logits(model, full, held, positions)
    torch.testing.assert_close(torch.cat(logits, 1)[held], expected[held], atol=5e-5, rtol=1e-3)
    if scope == "sample":
        for one, row in zip(kept, inputs["input_ids"] == 90, strict=True):
            total = int(row.sum())
            ratio = budget.get("keep_ratio")
            wanted = min(total, budget["num_tokens"]) if ratio is None else max(1, int(total * ratio + 0.5))
            assert len(one) == (wanted if total else 0)
