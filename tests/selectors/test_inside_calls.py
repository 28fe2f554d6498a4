"""Selectors that drop between layers, called in less usual ways; one or a few families of a kind."""

import copy
import io
import threading

import pytest
import torch
from asking import ONE, RAGGED, generate
from flash_stand_in import install, switch
from layered import METHODS, assert_close, build_deep, go_on, lengthen, masked_run, patched, stays, watched
from matrix import lacking
from reference import original_positions, positions_and_next
from tiny import IMAGE, make_inputs
from transformers import StaticCache
from versions import CACHE

from grip_hf import apply_grip, remove_grip
from grip_hf.errors import GripError, UnsupportedModelError

pytestmark = pytest.mark.usefixtures("no_grad")

PAIR = RAGGED[:2]
SHARED = {"depth": 8, "shared": 2}  # the last two layers read the keys of layers 4 and 5
names = pytest.mark.parametrize("name", METHODS)


@pytest.fixture
def flash(monkeypatch):
    install(monkeypatch)
    return switch


@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
@pytest.mark.parametrize("name", ["fastv", "sparsevlm"])
def test_layers_that_read_the_keys_of_earlier_ones(family, name):
    plain, inputs = build_deep(family, "eager", **SHARED), make_inputs(family, RAGGED)
    more = torch.tensor([[11, 12, 13, 11], [12, 13, 14, 12], [13, 14, 15, 11]])
    length, positions = inputs["input_ids"].shape[1], positions_and_next(plain, inputs, 4)
    for attention in ("eager", "sdpa"):
        model = patched(family, name, attention, **SHARED)
        prefill = {**inputs, "position_ids": positions[..., :length], "use_cache": True}
        out, gone = watched(plain, model, family, RAGGED, inputs, lambda: model(**prefill))  # noqa: B023
        held = stays(inputs, gone)
        assert_close(family, out.logits[held], masked_run(plain, inputs, gone).logits[held])
        whole = lengthen(family, inputs, more)
        turn = {"input_ids": more, "attention_mask": whole["attention_mask"], "position_ids": positions[..., length:]}
        expected = masked_run(plain, whole, go_on(gone, 4), positions).logits[:, length:]
        for last in (0, 1):  # Gemma4 leaves out positions between its layers where the last ones only are asked for
            found = model(**turn, **{CACHE: copy.deepcopy(out[CACHE])}, logits_to_keep=last).logits
            assert_close(family, found, expected[:, -last:])
            again = model(**prefill, logits_to_keep=last).logits
            assert_close(family, again[:, -1], out.logits[:, -1])
        greedy = generate(model, inputs)
        assert_close(family, greedy.logits[0], out.logits[:, -1])
        static = {"cache_implementation": "static", "disable_compile": True}

        def check():
            assert torch.equal(generate(plain, inputs, **static).sequences, generate(plain, inputs).sequences)  # noqa: B023

        if not lacking("static cache", family, check):
            assert torch.equal(generate(model, inputs, **static).sequences, greedy.sequences)
        uncached = generate(model, inputs, use_cache=False)
        assert torch.equal(uncached.sequences, greedy.sequences)
        assert_close(family, torch.stack(uncached.logits), torch.stack(greedy.logits))


@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_no_token_goes_after_a_layer_whose_keys_are_read_later(family):
    model = build_deep(family, **SHARED)
    with pytest.raises(
        UnsupportedModelError, match=r"layers 6 to 7 read .* from layer 4 on, .* some would at layer 6"
    ):
        apply_grip(model, selector="pyramiddrop", selector_kwargs=METHODS["pyramiddrop"][0], num_tokens=2)
    assert not hasattr(model, "grip")


@names
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3"])
def test_text_alone_is_the_unpatched_model(family, name):
    plain, model, inputs = build_deep(family), patched(family, name), make_inputs(family, [[5], [8]])
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    assert torch.equal(generate(model, inputs).sequences, generate(plain, inputs).sequences)


@pytest.mark.parametrize("selector", [*METHODS, "grid"])
def test_continuous_batching_of_text(selector):
    transformers = pytest.importorskip("transformers", minversion="5.23")
    small = {"num_blocks": 4, "max_batch_tokens": 64, "page_size": 32, "use_async_batching": False}
    found = []
    for patch in (False, True):
        model = build_deep("llava")
        model.generation_config.eos_token_id = 2
        if patch:
            apply_grip(model, selector=selector, num_tokens=2)
        config = transformers.ContinuousBatchingConfig(**small)
        prompts = [[5, 6, 7, 8], [9, 10, 11]]
        out = model.generate_batch(inputs=prompts, max_new_tokens=3, continuous_batching_config=config)
        found.append([(one.generated_tokens, one.error) for one in out.values()])
    assert found[0] == found[1] and [len(tokens) for tokens, _ in found[1]] == [3, 3]


@pytest.mark.parametrize("selector", ["fastv", "grid"])
def test_pictures_on_a_paged_cache_are_refused(selector):
    paged = type("PagedAttentionCache", (), {})()
    model = apply_grip(build_deep("llava"), selector=selector, num_tokens=2)
    with pytest.raises(GripError, match=r"cannot prune pictures on a paged KV cache \(generate_batch"):
        model(**make_inputs("llava", ONE), **{CACHE: paged})


@names
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_decoding_compiles_to_one_graph(family, name):
    model, inputs = patched(family, name), make_inputs(family, RAGGED)
    expected = generate(model, inputs, cache_implementation="static", disable_compile=True)
    graphs, length = [], inputs["input_ids"].shape[1]

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    cache = StaticCache(config=model.config, max_cache_len=length + 8)
    compiled = torch.compile(lambda **step: model(**step), backend=count, fullgraph=True)
    ids, mask, positions = inputs["input_ids"], inputs["attention_mask"], positions_and_next(model, inputs, 4)
    logits = model(**inputs, position_ids=positions[..., :length], **{CACHE: cache}).logits[:, -1]
    for step in range(4):
        assert_close(family, logits, expected.logits[step])
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        given = {
            CACHE: cache,
            "attention_mask": mask,
            "position_ids": positions[..., length + step : length + step + 1],
        }
        prepared = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **given)
        logits = compiled(**prepared).logits[:, -1]
    assert len(graphs) == 1
    torch._dynamo.reset()


@names
@pytest.mark.parametrize("prompts", [ONE, RAGGED], ids=["one", "ragged"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_flash_attention_gets_what_it_can_take(flash, name, prompts, use_cache):
    """With one row its positions have gaps, which it would read as packing."""
    for family in ("llava", "qwen2_vl"):
        inputs = make_inputs(family, prompts)
        expected = generate(patched(family, name), inputs, use_cache=use_cache)
        found = generate(flash(patched(family, name)), inputs, use_cache=use_cache)
        assert torch.equal(found.sequences, expected.sequences)
        assert_close(family, torch.stack(found.logits), torch.stack(expected.logits))


def test_flash_attention_beyond_a_window_is_refused(flash):
    model = flash(patched("cohere2_vision", "fastv"))
    with pytest.raises(GripError, match="cannot prune 14 positions with flash attention and a sliding window of 12"):
        model(**make_inputs("cohere2_vision", ONE))
    short = make_inputs("cohere2_vision", [[1, IMAGE, 1]])
    out = model(**short, use_cache=True)  # 9 positions
    assert out.logits.isfinite().all()
    with pytest.raises(GripError, match="cannot prune 14 positions with flash attention"):
        model(input_ids=torch.full((1, 5), 7), **{CACHE: out[CACHE]})


@names
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_budgets_copies_and_threads(family, name):
    model, inputs = patched(family, name), make_inputs(family, PAIR)
    file = io.BytesIO()
    torch.save(model, file)  # before the first call, which leaves hooks of transformers that cannot be pickled
    file.seek(0)
    plain, expected = build_deep(family)(**inputs).logits, {}
    for count in (1, 3):
        other = patched(family, name, num_tokens=count)
        expected[count] = other(**inputs).logits
        for twin in (model, copy.deepcopy(model), torch.load(file, weights_only=False)):
            with twin.grip.budget(num_tokens=count):
                assert torch.equal(twin(**inputs).logits, expected[count])
                with twin.grip.disabled():
                    assert torch.equal(twin(**inputs).logits, plain)
            file.seek(0)
    assert not torch.equal(expected[1], expected[3])
    failed = []

    def work(count):
        with torch.no_grad(), model.grip.budget(num_tokens=count):
            failed.extend(not torch.equal(model(**inputs).logits, expected[count]) for _ in range(4))

    threads = [threading.Thread(target=work, args=(count,)) for count in (1, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failed) == 8 and not any(failed)
    remove_grip(model)
    assert torch.equal(model(**inputs).logits, plain)


@names
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_gradients_are_those_of_the_masked_model(family, name):
    plain, model, inputs = build_deep(family, "eager"), patched(family, name, "eager"), make_inputs(family, PAIR)
    _, gone = watched(plain, model, family, PAIR, inputs, lambda: model(**inputs))
    held, positions = stays(inputs, gone), original_positions(plain, inputs)
    weights = {}
    with torch.enable_grad():
        for one, logits in (
            (model, model(**inputs, position_ids=positions, use_cache=False).logits),
            (plain, masked_run(plain, inputs, gone, grad=True).logits),
        ):
            logits[held].log_softmax(-1)[:, 7].sum().backward()
            weights[one] = {key: value.grad for key, value in one.named_parameters() if value.grad is not None}
    assert weights[model].keys() == weights[plain].keys()
    for key, gradient in weights[plain].items():
        torch.testing.assert_close(weights[model][key], gradient, atol=2e-3, rtol=2e-3)


@names
def test_gradient_checkpointing_is_refused(name):
    model, inputs = patched("llava", name), make_inputs("llava", PAIR)
    model.train()
    model.gradient_checkpointing_enable()
    with torch.enable_grad(), pytest.raises(GripError, match=f"'{name}' .*train with gradient_checkpointing=False"):
        model(**inputs, labels=inputs["input_ids"])
    with torch.enable_grad(), model.grip.disabled():
        model(**inputs, labels=inputs["input_ids"]).loss.backward()


@names
@pytest.mark.parametrize("family", ["gemma3"])
def test_pictures_after_the_first_call_are_refused_with_sliding_windows(family, name):
    model, inputs = patched(family, name), make_inputs(family, ONE)
    out = model(**inputs, use_cache=True)
    inputs["attention_mask"] = torch.ones(1, 2 * inputs["input_ids"].shape[1], dtype=torch.long)
    length = int(out[CACHE].get_seq_length())
    with pytest.raises(GripError, match=f"'{name}' cannot take pictures after the first call on a static cache"):
        model(**inputs, **{CACHE: out[CACHE]})
    assert int(out[CACHE].get_seq_length()) == length
