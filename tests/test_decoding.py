"""Ways to decode: static caches, sampling, assisted decoding, chunked prefill, flash attention, compilation."""

import copy

import pytest
import torch
from reference import assert_close, held_positions, reference_generate
from tiny import IMAGE, TINY, build, make_inputs, select_by_content
from transformers import StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grip_hf import apply_grip, remove_grip
from grip_hf.cache import PrunedCache
from grip_hf.errors import GripError

ONE = [[3, IMAGE, 4]]
RAGGED = [[3, IMAGE, 4], [2, IMAGE, 2, IMAGE, 3], [5]]
# One family of each kind: plain, M-RoPE, deepstack, masks made outside, windows made inside, shared layers.
KINDS = ["llava", "qwen2_vl", "qwen3_vl", "gemma3", "cohere2_vision", "mistral3", "gemma4"]
OTHERS = sorted(set(TINY) - set(KINDS))
every_family = pytest.mark.parametrize(
    "family", [*KINDS, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def prune(model, **settings):
    return apply_grip(model, selector=select_by_content, **(settings or {"keep_ratio": 0.5}))


def generate(model, inputs, **kwargs):
    kwargs = {
        "do_sample": False,
        "max_new_tokens": 6,
        "return_dict_in_generate": True,
        "output_logits": True,
        **kwargs,
    }
    return model.generate(**inputs, **kwargs)


def assert_same(family, one, other):
    assert torch.equal(one.sequences, other.sequences)
    assert_close(family, torch.stack(one.logits), torch.stack(other.logits))


@every_family
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("prompts", [ONE, RAGGED], ids=["one", "ragged"])
def test_static_cache(family, attention, prompts):
    model, inputs = build(family, attention), make_inputs(family, prompts)
    if family == "paligemma2":  # transformers itself cannot
        with pytest.raises(AttributeError, match="'dict' object has no attribute 'ndim'"):
            generate(model, inputs, cache_implementation="static", disable_compile=True)
        return
    prune(model)
    dynamic = generate(model, inputs)
    static = generate(model, inputs, cache_implementation="static", disable_compile=True)
    assert isinstance(static.past_key_values, StaticCache) and isinstance(static.past_key_values, PrunedCache)
    assert_same(family, static, dynamic)


@pytest.mark.parametrize("family", KINDS)
def test_sampling_draws_as_the_masked_model_would(family):
    model, inputs = build(family), make_inputs(family, ONE)
    prune(model)
    torch.manual_seed(1)
    one = generate(model, inputs, do_sample=True)
    torch.manual_seed(1)
    assert torch.equal(generate(model, inputs, do_sample=True).sequences, one.sequences)
    held = held_positions(inputs, model.grip.kept_tokens(one))
    remove_grip(model)
    assert_close(family, one.logits[0], reference_generate(model, inputs, held, 1)[1][:, 0])


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl", "cohere2_vision", "internvl", "smolvlm"])
def test_prompt_lookup_decoding(family):
    model, inputs = build(family), make_inputs(family, ONE)
    # A prompt that repeats itself, so that there are candidates: in the very first call too.
    more = torch.tensor([[11, 12, 13, 11, 12, 13, 11, 12]])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, more.shape[1]))
    prune(model)
    plain = generate(model, inputs)
    lengths = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    assisted = generate(model, inputs, prompt_lookup_num_tokens=3)
    hook.remove()
    assert lengths[0] > inputs["input_ids"].shape[1]
    assert_same(family, assisted, plain)
    assert torch.equal(*(model.grip.kept_tokens(out)[0] for out in (plain, assisted)))


def test_candidates_are_not_part_of_the_question():
    model, inputs = build("llava"), make_inputs("llava", ONE)
    seen = []

    def selector(batch):
        seen.append(int(batch.text_mask.sum()))
        return select_by_content(batch)

    apply_grip(model, keep_ratio=0.5, selector=selector)
    model(**inputs)
    model(**inputs, logits_to_keep=1)
    model(**inputs, logits_to_keep=3)
    assert seen == [7, 7, 5]


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "cohere2_vision"])
def test_chunked_prefill(family):
    model, inputs = build(family), make_inputs(family, [[3, IMAGE, 9]])
    size = int((inputs["input_ids"] > 89).nonzero()[-1, 1]) + 1  # ends with the picture
    prune(model)
    plain = generate(model, inputs)
    assert_same(family, generate(model, inputs, prefill_chunk_size=size), plain)
    assert_same(family, generate(model, inputs, prefill_chunk_size=size + 2), plain)
    with pytest.raises(GripError, match="split over two calls"):
        generate(model, inputs, prefill_chunk_size=size - 3)
    with model.grip.disabled():
        generate(model, inputs, prefill_chunk_size=size - 3)


@pytest.mark.parametrize("family", ["llava", "smolvlm"])
def test_generate_from_embeddings(family):
    model, inputs = build(family), make_inputs(family, ONE)
    prune(model)
    plain = generate(model, inputs)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    out = generate(model, {**inputs, "inputs_embeds": embeds})
    assert torch.equal(out.sequences, plain.sequences[:, -6:])


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl", "gemma3"])
def test_gradient_checkpointing(family):
    model, inputs = build(family), make_inputs(family, RAGGED)
    labels = inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | (inputs["input_ids"] > 88), -100)
    prune(model)
    model.train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        with torch.enable_grad():
            loss = model(**inputs, labels=labels, use_cache=False).loss
            loss.backward()
        grads.append({name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None})
        model.zero_grad(set_to_none=True)
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 10
    for name in grads[0]:
        torch.testing.assert_close(grads[1][name], grads[0][name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "cohere2_vision"])
def test_static_cache_copies(family):
    model, inputs = build(family), make_inputs(family, RAGGED)
    prune(model)
    cache = StaticCache(config=model.config, max_cache_len=inputs["input_ids"].shape[1] + 8)
    out = model(**inputs, past_key_values=cache)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]
    twin = copy.deepcopy(cache)
    assert int(twin.get_seq_length()) == int(cache.get_seq_length())
    assert torch.equal(*(torch.cat(model.grip.kept_tokens(one)) for one in (out, twin)))


def plain_flash(module, query, key, value, attention_mask, **kwargs):
    """What flash attention computes, in plain torch: a 2-D mask of the keys, or sequences told apart by lengths."""
    assert attention_mask is None or attention_mask.ndim == 2
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if attention_mask is not None:  # flash attention cuts the keys to the mask
        keys = attention_mask.shape[1]
        key, value = key[:, :, :keys], value[:, :, :keys]
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).expand(batch, 1, -1, -1)
    if attention_mask is not None:
        seen = seen & attention_mask.bool()[:, None, None]
    elif batch == 1 and kwargs.get("cu_seq_lens_q") is None and queries == keys and kwargs["position_ids"] is not None:
        jumps = (kwargs["position_ids"].diff(dim=-1, prepend=kwargs["position_ids"][:, :1] - 1) != 1).cumsum(-1)
        seen = seen & (jumps[:, :, None] == jumps[:, None])[:, None]
    scores = query @ key.transpose(2, 3) * kwargs["scaling"]
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


@pytest.fixture
def flash(monkeypatch):
    """Build models that believe to run flash attention; in its place runs plain torch."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", plain_flash)

    def as_flash(family):
        model = build(family, "sdpa")
        vision = model.config.vision_config._attn_implementation
        model.config._attn_implementation = "flash_attention_2"
        model.model.language_model.config._attn_implementation = "flash_attention_2"
        model.config.vision_config._attn_implementation = vision
        return model

    return as_flash


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl", "qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("prompts", [ONE, RAGGED], ids=["one", "ragged"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_flash_attention_gets_what_it_can_take(family, flash, prompts, use_cache):
    inputs = make_inputs(family, prompts)
    model = prune(build(family))
    expected = generate(model, inputs, use_cache=use_cache)
    model = prune(flash(family))
    assert_same(family, generate(model, inputs, use_cache=use_cache), expected)
    if use_cache:
        static = generate(model, inputs, cache_implementation="static", disable_compile=True)
        assert_same(family, static, expected)


@pytest.mark.parametrize("family", ["cohere2_vision", "mistral3"])
def test_windows_that_flash_attention_would_miscount_are_refused(family, flash):
    model = prune(flash(family))
    with pytest.raises(GripError, match="sliding window"):
        model(**make_inputs(family, RAGGED))


def test_decoding_compiles_to_one_graph():
    model, inputs = build("llava"), make_inputs("llava", RAGGED)
    prune(model)
    plain = generate(model, inputs, cache_implementation="static", disable_compile=True)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    eager = model.forward
    cache = StaticCache(config=model.config, max_cache_len=inputs["input_ids"].shape[1] + 8)
    compiled = torch.compile(lambda **step: model(**step), backend=count, fullgraph=True)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(**inputs, position_ids=positions, past_key_values=cache).logits[:, -1]
    for step in range(4):
        assert_close("llava", logits, plain.logits[step])
        token = logits.argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        positions = positions[:, -1:] + 1
        prepared = model.prepare_inputs_for_generation(
            ids, next_sequence_length=1, past_key_values=cache, attention_mask=mask, position_ids=positions
        )
        logits = compiled(**prepared).logits[:, -1]
    assert len(graphs) == 1 and model.forward == eager
    torch._dynamo.reset()
