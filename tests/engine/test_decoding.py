"""Ways to decode: static caches, candidates, compilation."""

import copy

import pytest
import torch
from asking import ONE, RAGGED, generate, prune
from matrix import KINDS, every_family, lacking
from reference import assert_close
from tiny import build, make_inputs, select_by_content
from transformers import StaticCache
from versions import CACHE

from grip_hf import apply_grip, remove_grip
from grip_hf.engine.cache import PrunedCache

pytestmark = pytest.mark.usefixtures("no_grad")


def assert_same(family, one, other):
    assert torch.equal(one.sequences, other.sequences)
    assert_close(family, torch.stack(one.logits), torch.stack(other.logits))


@every_family(KINDS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("prompts", [ONE, RAGGED], ids=["one", "ragged"])
def test_static_cache(family, attention, prompts):
    model, inputs = build(family, attention), make_inputs(family, prompts)
    in_static_cache = {"cache_implementation": "static", "disable_compile": True}

    def check():
        dynamic = generate(model, inputs)
        static = generate(model, inputs, **in_static_cache)
        assert_same(family, static, dynamic)
        return static[CACHE]

    if lacking("static cache", family, check):
        return
    prune(model)
    cache = check()
    assert isinstance(cache, StaticCache) and isinstance(cache, PrunedCache)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "internvl"])
@pytest.mark.parametrize("ratio", [None, 0.25, 0.5], ids=["whole", "quarter", "same"])
def test_assistant_model(family, ratio):
    """A twin of the model proposes tokens, unpruned or pruned as it likes; what comes out is the model's own."""
    model, inputs = prune(build(family)), make_inputs(family, ONE)
    plain, twin, calls = generate(model, inputs), prune(build(family), keep_ratio=ratio or 1.0), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with model.grip.disabled(), twin.grip.disabled():
        generate(model, inputs, assistant_model=twin)
    unpruned = len(calls)
    if ratio is None:
        remove_grip(twin)
    assisted = generate(model, inputs, assistant_model=twin)
    assert_same(family, assisted, plain)
    assert torch.equal(*(model.grip.kept_tokens(out)[0] for out in (plain, assisted)))
    if ratio == 0.5:  # a twin that sees the same proposes as well as without pruning
        assert len(calls) - unpruned <= unpruned


def test_neither_candidates_nor_logits_to_keep_change_the_question():
    model, inputs = build("llava"), make_inputs("llava", ONE)
    seen = []

    def selector(batch):
        seen.append(int(batch.text_mask.sum()))
        return select_by_content(batch)

    apply_grip(model, keep_ratio=0.5, selector=selector)
    model(**inputs)
    model(**inputs, logits_to_keep=1)
    model(**inputs, logits_to_keep=3)
    model.generate(**inputs, prompt_lookup_num_tokens=3, max_new_tokens=4)  # its first call has candidates too
    assert seen == [7] * 4


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "cohere2_vision"])
def test_static_cache_copies(family):
    model, inputs = build(family), make_inputs(family, RAGGED)

    def fill():
        cache = StaticCache(config=model.config, max_cache_len=inputs["input_ids"].shape[1] + 8)
        return cache, model(**inputs, **{CACHE: cache})

    if lacking("static cache", family, fill):
        return
    prune(model)
    cache, out = fill()
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]
    twin = copy.deepcopy(cache)
    assert int(twin.get_seq_length()) == int(cache.get_seq_length())
    assert torch.equal(*(torch.cat(model.grip.kept_tokens(one)) for one in (out, twin)))


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
    logits = model(**inputs, position_ids=positions, **{CACHE: cache}).logits[:, -1]
    for step in range(4):
        assert_close("llava", logits, plain.logits[step])
        token = logits.argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        positions = positions[:, -1:] + 1
        prepared = model.prepare_inputs_for_generation(
            ids, next_sequence_length=1, **{CACHE: cache}, attention_mask=mask, position_ids=positions
        )
        logits = compiled(**prepared).logits[:, -1]
    assert len(graphs) == 1 and model.forward == eager
    torch._dynamo.reset()
