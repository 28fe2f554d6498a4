"""Selectors that drop between layers, on every family, against the unpatched model masked layer by layer."""

import copy
import pickle

import pytest
import torch
from asking import RAGGED, generate
from layered import (
    METHODS,
    assert_close,
    build_deep,
    dropped,
    go_on,
    groups_of,
    lengthen,
    masked_run,
    patched,
    stays,
    watched,
)
from matrix import REFUSED, STATES, every_family, lacking
from reference import lengthen_types, original_positions, positions_and_next
from tiny import EAGER_ONLY, IMAGE, IMAGE_ID, make_inputs
from versions import CACHE, RESET_EMPTIES

from grip_hf import apply_grip
from grip_hf.errors import CacheError, UnsupportedModelError

pytestmark = pytest.mark.usefixtures("no_grad")

LIMITS = REFUSED["drops between layers"]
RECURRENT = {family for family, reason in LIMITS.items() if reason == STATES}
PAIR = RAGGED[:2]  # unequal rows, one of them padded
LONG_TEXT = [[40], *PAIR]  # the longest row loses nothing, so that no call gets shorter
STATIC = {"cache_implementation": "static", "disable_compile": True}
_plain = {}


def methods(test):
    """Parametrize a test by `family` and `name`, the selector."""
    return pytest.mark.parametrize("name", METHODS)(every_family(without=RECURRENT)(test))


def unpatched(family):
    """The unpatched eager model, shared by tests, none of which changes it."""
    if family not in _plain:
        _plain.clear()  # one at a time
        _plain[family] = build_deep(family, "eager")
    return _plain[family]


def attentions(family):
    return ("eager",) if family in EAGER_ONLY else ("eager", "sdpa")


@methods
@pytest.mark.parametrize("scope", ["sample", "image"])
def test_logits_equal_masking_layer_by_layer(family, name, scope):
    plain, inputs = unpatched(family), make_inputs(family, RAGGED)
    call = {**inputs, "position_ids": original_positions(plain, inputs)}
    whole = plain(**call).logits
    for attention in attentions(family):
        model = patched(family, name, attention, scope=scope)
        found, gone = watched(plain, model, family, RAGGED, inputs, lambda: model(**call).logits, scope)  # noqa: B023
        held = stays(inputs, gone)
        assert found.shape == whole.shape and (found - whole)[held].abs().max() > 1e-2
        assert_close(family, found[held], masked_run(plain, inputs, gone).logits[held])


@methods
def test_decoding_sees_the_same_tokens(family, name):
    """Greedy, with a dynamic and a static cache, and with none."""
    plain, inputs = unpatched(family), make_inputs(family, RAGGED)
    length = inputs["input_ids"].shape[1]
    for attention in attentions(family):
        model = patched(family, name, attention)
        out, gone = watched(plain, model, family, RAGGED, inputs, lambda: generate(model, inputs))  # noqa: B023
        new = out.sequences[:, length:]
        longer, positions = lengthen(family, inputs, new), positions_and_next(plain, inputs, new.shape[1])
        expected = masked_run(plain, longer, go_on(gone, new.shape[1]), positions).logits[:, length - 1 : -1]
        assert_close(family, torch.stack(out.logits, 1), expected)
        held = [layer.keys.shape[2] for layer in out[CACHE].layers if not layer.is_sliding]
        # And the cache really gets that small, but where all layers are sliding ones.
        assert held == sorted(held, reverse=True) and (not held or held[0] > held[-1])
        for options, check in ((STATIC, "static cache"), ({"use_cache": False}, "no cache")):
            control = build_deep(family, attention)
            if not lacking(check, family, lambda: generate(control, inputs, **options)):  # noqa: B023
                other = generate(model, inputs, **options)
                assert torch.equal(other.sequences, out.sequences)
                assert_close(family, torch.stack(other.logits), torch.stack(out.logits))


@methods
def test_beams_equal_those_without_a_cache(family, name):
    inputs, control = make_inputs(family, RAGGED[:1]), build_deep(family)
    if lacking("no cache", family, lambda: generate(control, inputs, use_cache=False)):
        return
    beams = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    if lacking("beams of one picture", family, lambda: beams_agree(family, control, inputs, beams)):
        return
    beams_agree(family, patched(family, name), inputs, beams)


def beams_agree(family, model, inputs, beams):
    out, uncached = generate(model, inputs, **beams), generate(model, inputs, use_cache=False, **beams)
    assert torch.equal(out.sequences, uncached.sequences)
    assert_close(family, out.sequences_scores, uncached.sequences_scores)


@methods
def test_what_is_done_to_a_cache_between_calls(family, name):
    model, inputs = patched(family, name), make_inputs(family, PAIR)
    positions = positions_and_next(model, inputs, 1)
    prefill = {**inputs, "position_ids": positions[..., :-1], "use_cache": True}
    out = model(**prefill)
    tokens = torch.tensor([[7], [8]])
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)

    def step(cache, rows):
        rows = torch.tensor(rows)
        now = positions[..., rows, -1:]
        return model(input_ids=tokens[rows], attention_mask=mask[rows], position_ids=now, **{CACHE: cache}).logits

    expected = step(copy.deepcopy(out[CACHE]), [0, 1])
    for change, rows in (
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda cache: None, [0, 1]),
    ):
        cache = pickle.loads(pickle.dumps(out[CACHE]))
        change(cache)
        assert_close(family, step(cache, rows), expected[rows])
    step(cache := copy.deepcopy(out[CACHE]), [0, 1])
    if not any(cache.is_sliding):  # transformers does not take back what a window has forgotten
        cache.crop(-1)
        assert torch.equal(step(cache, [0, 1]), expected)
    lengths = [layer.get_seq_length() for layer in cache.layers]
    with pytest.raises(CacheError, match="the cut lies among its"):
        cache.crop(-8)
    assert [layer.get_seq_length() for layer in cache.layers] == lengths
    if RESET_EMPTIES:
        cache.reset()
        assert_close(family, model(**prefill, **{CACHE: cache}).logits, out.logits)


@methods
def test_a_text_turn_on_the_same_cache(family, name):
    plain, model, inputs = unpatched(family), patched(family, name), make_inputs(family, PAIR)
    more = torch.tensor([[11, 12, 13, 11], [12, 13, 14, 12]])
    length, positions = inputs["input_ids"].shape[1], positions_and_next(model, inputs, 4)
    prefill = {**inputs, "position_ids": positions[..., :length], "use_cache": True}
    out, gone = watched(plain, model, family, PAIR, inputs, lambda: model(**prefill))
    whole = lengthen(family, inputs, more)
    turn = {"input_ids": more, "attention_mask": whole["attention_mask"], "position_ids": positions[..., length:]}
    found = model(**turn, **{CACHE: out[CACHE]}).logits
    if not lacking("later turns", family, lambda: assert_the_end_changes_nothing_before(plain, inputs)):
        assert_close(family, found, masked_run(plain, whole, go_on(gone, 4), positions).logits[:, length:])


def assert_the_end_changes_nothing_before(model, inputs):
    """What is said later is not seen before it."""
    longer = {**inputs, "input_ids": inputs["input_ids"].clone()}
    longer["input_ids"][:, -1] = 7
    one, other = (model.model(**call).last_hidden_state for call in (inputs, longer))
    real = inputs["attention_mask"][:, :-1].bool()
    assert torch.allclose(one[:, :-1][real], other[:, :-1][real], atol=1e-3)


@methods
def test_prompt_lookup(family, name):
    model, inputs = patched(family, name), make_inputs(family, PAIR[:1])
    inputs = lengthen(family, inputs, torch.tensor([[11, 12, 13, 11, 12, 13, 11, 12]]))
    if lacking("prompt lookup", family, lambda: generate(unpatched(family), inputs, prompt_lookup_num_tokens=3)):
        return
    assisted, greedy = generate(model, inputs, prompt_lookup_num_tokens=3), generate(model, inputs)
    assert torch.equal(assisted.sequences, greedy.sequences)
    assert_close(family, torch.stack(assisted.logits), torch.stack(greedy.logits))


@methods
def test_hidden_states_and_attentions_of_every_layer(family, name):
    """Also in a batch whose longest row loses nothing, so that lengths tell nothing."""
    plain, model = unpatched(family), patched(family, name, "eager")
    asked = {"output_hidden_states": True, "output_attentions": True}
    for prompts in (RAGGED, LONG_TEXT):
        inputs = make_inputs(family, prompts)
        call = {**inputs, "position_ids": original_positions(plain, inputs), **asked}
        found, gone = watched(plain, model, family, prompts, inputs, lambda: model(**call))  # noqa: B023
        expected, held = masked_run(plain, inputs, gone, **asked), stays(inputs, gone)
        for kind in ("hidden_states", "attentions"):
            assert [one.shape for one in found[kind]] == [one.shape for one in expected[kind]]
        for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
            assert torch.allclose(one[..., held, :], other[..., held, :], atol=1e-3, rtol=1e-3)
        for one, other in zip(found.attentions, expected.attentions, strict=True):
            assert torch.allclose(one.transpose(1, 2)[held], other.transpose(1, 2)[held], atol=1e-4)


@methods
def test_an_answer_does_not_rank(family, name):
    """In training the call holds the answer, and padding after it: what goes must be what generation drops."""
    plain, model, prompt = unpatched(family), patched(family, name), make_inputs(family, PAIR)
    _, gone = watched(plain, model, family, PAIR, prompt, lambda: model(**prompt))
    whole, positions = (
        lengthen(family, prompt, torch.tensor([[7, 8, 2], [9, 6, 2]])),
        positions_and_next(plain, prompt, 5),
    )
    labels = torch.nn.functional.pad(torch.full_like(prompt["input_ids"], -100), (0, 3), value=7)
    expected = masked_run(plain, whole, go_on(gone, 3), positions[..., :-2], labels=labels).logits
    padded = {**whole, **{key: torch.nn.functional.pad(whole[key], (0, 2)) for key in ("input_ids", "attention_mask")}}
    lengthen_types(family, padded, 2)
    labels = torch.nn.functional.pad(labels, (0, 2), value=-100)
    found = model(**padded, position_ids=positions, labels=labels).logits[:, :-2]
    held = stays(whole, go_on(gone, 3))
    assert_close(family, found[held], expected[held])


@methods
def test_each_turn_of_a_conversation_ranks_its_own_picture(family, name):
    prompts = [[2, IMAGE, 4, IMAGE, 3], PAIR[0]]
    plain, model, inputs = unpatched(family), patched(family, name), make_inputs(family, prompts)
    ids = inputs["input_ids"][0].tolist()
    pictures = groups_of(family, inputs, prompts, scope="image")
    said = [place for place in range(pictures[0][1][-1], pictures[1][1][0]) if 3 <= ids[place] < 89]
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, said[2:]] = inputs["input_ids"][0, said[2:]]  # the first turn's answer
    call = {**inputs, "labels": labels, "position_ids": original_positions(plain, inputs)}
    seen, own = [], model.grip.selector.asking
    model.grip.selector.asking = lambda batch: seen.append((batch.text_index, own(batch))) or own(batch)
    found = model(**call).logits
    places, named = seen[0]
    ends = [said[1], len(ids) - 1, len(ids) - 1]
    asking = [[] if named is None else places[group, named[group]].tolist() for group in range(len(ends))]
    asking = [one or [end] for one, end in zip(asking, ends, strict=True)]  # where no word rates, the last one does
    assert max(asking[0]) <= said[1] and min(asking[1]) > said[-1]
    gone = dropped(plain, inputs, name, pictures, asking)
    held = stays(inputs, gone)
    assert int((held & (inputs["input_ids"] == IMAGE_ID)).sum()) == 6
    assert_close(family, found[held], masked_run(plain, inputs, gone, labels=labels).logits[held])


@pytest.mark.parametrize("family", sorted(RECURRENT))
@pytest.mark.parametrize("name", METHODS)
def test_recurrent_layers_are_refused_and_nothing_changes(family, name):
    model = build_deep(family)

    def state():
        return {key: (set(vars(module)), len(module._forward_hooks)) for key, module in model.named_modules()}

    before = state()
    with pytest.raises(UnsupportedModelError, match=f"'{name}' cannot drop .* carry a state from token to token"):
        apply_grip(model, selector=name, selector_kwargs=METHODS[name][0], num_tokens=2)
    assert state() == before
