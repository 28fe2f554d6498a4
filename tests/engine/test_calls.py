"""Less usual ways to call every family: sampling, prompt lookup, chunks, embeddings, checkpointing, packing, flash."""

import copy
import pickle

import pytest
import torch
from asking import ONE, RAGGED, generate, prune
from flash_stand_in import install, switch
from matrix import every_family, lacking, refused
from reference import (
    assert_close,
    held_positions,
    lengthen_types,
    original_positions,
    reference_generate,
)
from tiny import EAGER_ONLY, IMAGE, TINY, build, join_pictures, make_inputs
from versions import CACHE

from grip_hf import remove_grip
from grip_hf.errors import GripError

pytestmark = pytest.mark.usefixtures("no_grad")


def assert_same(family, one, other):
    assert torch.equal(one.sequences, other.sequences)
    assert_close(family, torch.stack(one.logits), torch.stack(other.logits))


@every_family()
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


@every_family()
def test_prompt_lookup_decoding(family):
    model, inputs = build(family), make_inputs(family, ONE)
    # A prompt that repeats itself, so that there are candidates: in the very first call too.
    more = torch.tensor([[11, 12, 13, 11, 12, 13, 11, 12]])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    lengthen_types(family, inputs, more.shape[1])
    if lacking("prompt lookup", family, lambda: generate(model, inputs, prompt_lookup_num_tokens=3)):
        return
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


@every_family()
def test_chunked_prefill(family):
    model, inputs = build(family), make_inputs(family, [[3, IMAGE, 9]])
    size = int((inputs["input_ids"] > 89).nonzero()[-1, 1]) + 1  # ends with the picture
    whole = generate(model, inputs)
    if lacking(
        "chunked prefill", family, lambda: assert_same(family, generate(model, inputs, prefill_chunk_size=size), whole)
    ):
        return
    prune(model)
    plain = generate(model, inputs)
    assert_same(family, generate(model, inputs, prefill_chunk_size=size), plain)
    assert_same(family, generate(model, inputs, prefill_chunk_size=size + 2), plain)
    with pytest.raises(GripError, match="split over two calls"):
        generate(model, inputs, prefill_chunk_size=size - 3)
    with model.grip.disabled():
        generate(model, inputs, prefill_chunk_size=size - 3)


@every_family()
def test_embeddings_instead_of_ids(family):
    model, inputs = build(family), make_inputs(family, [[3, IMAGE, 4], [3, IMAGE, 4]])
    positions = original_positions(model, inputs)
    prune(model)
    expected = model(**inputs, position_ids=positions).logits
    ids = inputs.pop("input_ids")
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(**inputs, position_ids=positions, inputs_embeds=embeds).logits, expected)


@every_family()
def test_generate_from_embeddings(family):
    model, inputs = build(family), make_inputs(family, ONE)
    embeds = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    del embeds["input_ids"]

    def check():
        from_embeds, plain = generate(model, embeds), generate(model, inputs)
        assert_close(family, from_embeds.logits[0], plain.logits[0])
        assert torch.equal(from_embeds.sequences, plain.sequences[:, -6:])

    if not lacking("embeddings", family, check):
        prune(model)
        check()


@every_family()
def test_gradient_checkpointing(family):
    model, inputs = build(family), make_inputs(family, ONE)
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


@every_family()
def test_tuples_and_rows_of_logits(family):
    model, inputs = build(family), make_inputs(family, RAGGED)

    def check_rows():
        logits = model(**inputs).logits
        for rows in (1, torch.tensor([-1])):
            assert_close(family, model(**inputs, logits_to_keep=rows).logits, logits[:, -1:])

    lacks = lacking("logits_to_keep", family, check_rows)
    prune(model)
    expected = model.model(**inputs).last_hidden_state
    assert torch.equal(model.model(**inputs, return_dict=False)[0], expected)
    assert torch.equal(model(**inputs, return_dict=False)[0], model(**inputs).logits)
    if not lacks:
        check_rows()


@every_family()
def test_copies_and_pickles_of_a_model_stay_pruned(family):
    model, inputs = build(family), make_inputs(family, ONE)
    prune(model)
    pickled = pickle.dumps(model)  # later on transformers leaves hooks of its own that cannot be pickled
    expected = model(**inputs).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickled)):
        assert torch.equal(twin(**inputs).logits, expected)
        twin.lm_head.weight.zero_()
        assert not twin(**inputs).logits.any()
    assert torch.equal(model(**inputs).logits, expected)


@every_family()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_sequences_stay_apart(family, attention):
    """Two prompts in one row, told apart by their positions alone, as padding-free training passes them."""
    model = build(family, attention)
    both = [make_inputs(family, [prompt]) for prompt in ([3, IMAGE, 4], [2, IMAGE, 3, 2])]
    positions = []
    for inputs in both:
        plain = torch.arange(inputs["input_ids"].shape[1])[None]
        kinds = original_positions(model, inputs)
        positions.append(plain if kinds.ndim == 2 else torch.cat([plain[None], kinds]))
    text = ["input_ids", *(name for name in both[0] if "type_ids" in name)]
    packed = {name: torch.cat([inputs[name] for inputs in both], 1) for name in text}
    pictures = [{name: inputs[name] for name in inputs if name not in (*text, "attention_mask")} for inputs in both]
    if TINY[family].stacked:
        packed["pixel_values"] = torch.cat([one["pixel_values"] for one in pictures], 1)
    else:
        packed.update(join_pictures(family, pictures))

    def check():
        singles = [model(**inputs, use_cache=False).logits[0] for inputs in both]
        out = model(**packed, position_ids=torch.cat(positions, -1), use_cache=False).logits[0]
        assert_close(family, out, torch.cat(singles))

    wrong = lacking("packed rows", family, check) or refused("packed rows", family)
    prune(model, num_tokens=3, scope="image")
    if wrong:
        with pytest.raises(GripError, match="packed"):
            check()
    else:
        check()


@pytest.mark.parametrize("family", ["lfm2_vl", "qwen3_5"])
def test_caches_with_recurrent_layers(family):
    """Lengths are logical, a crop that fails changes nothing, and later rows must keep equal numbers of tokens."""
    model, inputs = build(family), make_inputs(family, ONE * 2)
    prune(model)
    cache = model(**inputs, use_cache=True)[CACHE]
    state, length = cache.grip_states[0], inputs["input_ids"].shape[1]
    assert cache.get_seq_length() == length and cache.get_mask_sizes(1, 0) == (length + 1, 0)
    with pytest.raises(RuntimeError, match="crop"):
        cache.crop(-1)
    assert cache.grip_states[0] is state
    second = make_inputs(family, [[2, IMAGE, 3], [4, IMAGE, 1]])
    second["attention_mask"] = torch.ones(2, length + second["input_ids"].shape[1], dtype=torch.long)
    second["position_ids"] = torch.arange(length, second["attention_mask"].shape[1]).expand(2, -1)
    with model.grip.budget(num_tokens=[2, 4]), pytest.raises(GripError, match="fillers would change their state"):
        model(**second, **{CACHE: cache})
    with model.grip.disabled():
        model(**second, **{CACHE: cache})


def test_token_types_of_another_length_are_refused():
    model, inputs = build("ernie4_5_vl_moe"), make_inputs("ernie4_5_vl_moe", ONE)
    prune(model)
    with pytest.raises(GripError, match="moe_mm_token_type_ids covers 15 positions, but the call has 16"):
        generate(model, inputs, use_cache=False)


@pytest.fixture
def flash(monkeypatch):
    """Build models that believe to run flash attention; in its place runs plain torch."""
    install(monkeypatch)

    def as_flash(family):
        if family in EAGER_ONLY:
            raise ValueError("transformers has no other attention")
        return switch(build(family, "sdpa"))

    return as_flash


@every_family()
@pytest.mark.parametrize("prompts", [ONE, RAGGED], ids=["one", "ragged"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_flash_attention_gets_what_it_can_take(family, flash, prompts, use_cache):
    inputs = make_inputs(family, prompts)

    def check(prepare):
        expected = generate(prepare(build(family)), inputs, use_cache=use_cache)
        model = prepare(flash(family))
        assert_same(family, generate(model, inputs, use_cache=use_cache), expected)
        if use_cache:
            static = generate(model, inputs, cache_implementation="static", disable_compile=True)
            assert_same(family, static, expected)

    if lacking("flash", family, lambda: check(lambda model: model)):
        return
    if not use_cache and lacking("no cache", family, lambda: check(lambda model: model)):
        return
    if refused("flash", family):
        with pytest.raises(GripError, match="sliding window"):
            check(prune)
    else:
        check(prune)
