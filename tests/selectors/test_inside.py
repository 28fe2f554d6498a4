"""FastV and PyramidDrop against the unpatched model with the dropped tokens masked out layer by layer."""

import copy
import io
import math

import pytest
import tiny
import torch
from batches import one_group
from versions import CACHE

from grip_hf import apply_grip, remove_grip
from grip_hf.errors import ConfigError, GripError, UnsupportedModelError
from grip_hf.selectors import get_selector
from grip_hf.selectors.inside import AtDepth

DEPTH = 5
PROMPTS = [[3, tiny.IMAGE, 4], [tiny.IMAGE, 2, tiny.IMAGE, 3, 5]]
# name -> (arguments, [(layer that ranks, first layer without the dropped tokens)], tokens left per stage)
METHODS = {
    "fastv": ({}, [(1, 2)], lambda total, budget: [budget]),
    "pyramiddrop": (
        {"depths": [0.4, 0.8]},
        [(2, 2), (4, 4)],
        lambda total, budget: [round(total * (budget / total) ** 0.5), budget],
    ),
    "sparsevlm": (
        {"depths": [0.2, 0.4, 0.45]},  # layers 1, 2 and 2 again
        [(1, 2), (2, 3)],
        lambda total, budget: [round(total * (budget / total) ** 0.5), budget],
    ),
}


def build(attention="eager"):
    config = tiny.TINY["llava"].config()
    config.text_config.num_hidden_layers = DEPTH
    config.text_config.layer_types = None
    torch.manual_seed(0)
    return tiny.AutoModelForImageTextToText.from_config(config, attn_implementation=attention).eval()


def masked_run(model, inputs, gone):
    """Run the unpatched eager model; from each layer on, hide the columns that `gone` gives for it ([B, L] bool)."""

    def hide(first):
        def hook(layer, args, kwargs):
            mask = kwargs["attention_mask"]
            hidden = torch.nn.functional.pad(gone[first], (0, mask.shape[-1] - gone[first].shape[1]))
            mask = mask.masked_fill(hidden[:, None, None], torch.finfo(mask.dtype).min)
            return args, {**kwargs, "attention_mask": mask}

        return hook

    layers = model.model.language_model.layers
    handles = []
    for index, layer in enumerate(layers):
        handles += [layer.register_forward_pre_hook(hide(first), with_kwargs=True) for first in gone if index >= first]
    with torch.no_grad():
        output = model(**inputs, output_attentions=True, use_cache=False)
    for handle in handles:
        handle.remove()
    return output


def who_ranks(model, inputs, name, answer):
    """Per row the positions whose attention ranks: the last of the prompt, or SparseVLM's raters in plain loops."""
    if name != "sparsevlm":
        return [[-1 - answer]] * len(inputs["input_ids"])
    with torch.no_grad():
        pictures = model.model.get_image_features(inputs["pixel_values"]).pooler_output
        tokens, found = iter(torch.cat(list(pictures))), []
        for ids, mask in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True):
            seen = [next(tokens) for token in ids if token == tiny.IMAGE_ID]
            last = max(i for i, token in enumerate(ids) if token == tiny.IMAGE_ID)
            places = [i for i in range(last + 1, len(ids) - answer) if mask[i]]
            words = [model.get_input_embeddings()(torch.tensor(ids[i])) for i in places]
            drawn = [0.0] * len(words)
            for token in seen:
                spread = [math.exp(float(token @ word)) for word in words]
                drawn = [total + one / sum(spread) for total, one in zip(drawn, spread, strict=True)]
            more = [place for place, one in zip(places, drawn, strict=True) if one > sum(drawn) / len(drawn)]
            assert bool(more) == (len(places) > 1)  # a single word draws the mean, no more
            found.append(more or [-1 - answer])
    return found


def reference(model, inputs, name, budgets, answer=0):
    """Dropped tokens per layer, found by ranking with the attention maps of the unpatched eager model.

    The last `answer` tokens of each row are no part of the prompt.
    """
    _, stages, left = METHODS[name]
    visual, gone = inputs["input_ids"] == tiny.IMAGE_ID, {}
    asking = who_ranks(model, inputs, name, answer)
    for stage, (rank, drop) in enumerate(stages):
        maps = masked_run(model, inputs, gone).attentions[rank]
        scores = torch.stack([one[:, places].mean((0, 1)) for one, places in zip(maps, asking, strict=True)])
        dropped = torch.zeros_like(visual)
        for row, budget in enumerate(budgets):
            alive = visual[row].clone()
            for earlier in gone.values():
                alive &= ~earlier[row]
            keep = left(int(visual[row].sum()), budget)[stage]
            order = sorted(alive.nonzero().flatten().tolist(), key=lambda i: -float(scores[row, i]))
            dropped[row, order[keep:]] = True
        gone[drop] = dropped
    return gone


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("settings", "budgets"), [({"num_tokens": 6}, [6, 6]), ({"keep_ratio": 0.25}, [4, 8])])
def test_logits_equal_masking_layer_by_layer(name, attention, settings, budgets):
    plain, inputs = build(), tiny.make_inputs("llava", PROMPTS)
    gone = reference(plain, inputs, name, budgets)
    expected = masked_run(plain, inputs, gone).logits
    model = build(attention)
    apply_grip(model, selector=name, selector_kwargs=METHODS[name][0], **settings)
    with torch.no_grad():
        found = model(**inputs).logits
    stays = inputs["attention_mask"].bool()
    for dropped in gone.values():
        stays &= ~dropped
    torch.testing.assert_close(found[stays], expected[stays], atol=1e-4, rtol=1e-3)
    assert found.shape == expected.shape
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            alone = model(**tiny.make_inputs("llava", [prompt])).logits[0]
        torch.testing.assert_close(found[row, -1], alone[-1], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("settings", [{"num_tokens": 6}, {"keep_ratio": 0.25}])
def test_cached_decoding_sees_the_same_tokens(name, attention, settings):
    plain, inputs = build(), tiny.make_inputs("llava", PROMPTS)
    gone = reference(plain, inputs, name, [6, 6] if "num_tokens" in settings else [4, 8])
    model = build(attention)
    apply_grip(model, selector=name, selector_kwargs=METHODS[name][0], **settings)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    found = model.generate(**inputs, **options, eos_token_id=None)
    new = found.sequences.shape[1] - inputs["input_ids"].shape[1]
    whole = {**inputs, "input_ids": found.sequences}
    whole["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, new), value=1)
    long = {first: torch.nn.functional.pad(dropped, (0, new)) for first, dropped in gone.items()}
    expected = masked_run(plain, whole, long).logits[:, -new - 1 : -1]
    torch.testing.assert_close(torch.stack(found.logits, 1), expected, atol=1e-4, rtol=1e-3)
    lengths = [layer.get_seq_length() for layer in found[CACHE].layers]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1]
    beams = model.generate(**inputs, max_new_tokens=3, num_beams=3, eos_token_id=None)
    again = model.generate(**inputs, max_new_tokens=3, num_beams=3, eos_token_id=None)
    assert torch.equal(beams, again)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_later_layers_remember_after_a_whole_picture(name, attention):
    """Nothing is padded but fillers; a second turn keeps all of its picture, and decoding gives no mask."""
    plain, inputs = build(), tiny.make_inputs("llava", [[3, tiny.IMAGE, 4]] * 2)
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    gone = reference(plain, inputs, name, [2, 13])
    model, tokens = build(attention), torch.tensor([[5, 7], [9, 8]])
    apply_grip(model, selector=name, selector_kwargs=METHODS[name][0], keep_ratio=0.5)
    with torch.no_grad():
        with model.grip.budget(num_tokens=[2, 13]):
            cache = model(**inputs, use_cache=True)[CACHE]
        with model.grip.disabled():
            found = [model(input_ids=ids, pixel_values=pixels.flip(0), **{CACHE: cache}).logits]
        found += [model(input_ids=token, **{CACHE: cache}).logits for token in tokens.split(1, 1)]
    whole = {"input_ids": torch.cat([ids, ids, tokens], 1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    whole["pixel_values"] = torch.stack([pixels, pixels.flip(0)], 1).flatten(0, 1)  # row by row
    long = {first: torch.nn.functional.pad(one, (0, ids.shape[1] + 2)) for first, one in gone.items()}
    expected = masked_run(plain, whole, long).logits[:, ids.shape[1] :]
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("padded", [False, True])
def test_an_answer_does_not_rank(name, padded):
    """In training the call holds the answer too: what is dropped must be what generation drops."""
    plain, inputs = build(), tiny.make_inputs("llava", PROMPTS)
    answer = 3
    more = torch.tensor([[7, 8, 2], [9, 6, 2]])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
    inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, answer), value=1)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -answer:] = more
    gone = reference(plain, inputs, name, [4, 8], answer)
    other = reference(plain, inputs, name, [4, 8])
    assert any(not torch.equal(gone[first], other[first]) for first in gone)
    expected = masked_run(plain, inputs, gone).logits
    stays = inputs["attention_mask"].bool()
    for dropped in gone.values():
        stays &= ~dropped
    if padded:  # as trainers pad, on the right
        inputs |= {name: torch.nn.functional.pad(inputs[name], (0, 2)) for name in ("input_ids", "attention_mask")}
        labels = torch.nn.functional.pad(labels, (0, 2), value=-100)
    model = build("sdpa")
    apply_grip(model, selector=name, selector_kwargs=METHODS[name][0], keep_ratio=0.25)
    with torch.no_grad():
        found = model(**inputs, labels=labels).logits[:, : stays.shape[1]]
    torch.testing.assert_close(found[stays], expected[stays], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_decoding_without_a_cache_drops_the_same(name):
    model, inputs = build("sdpa"), tiny.make_inputs("llava", PROMPTS)
    apply_grip(model, selector=name, selector_kwargs=METHODS[name][0], keep_ratio=0.25)
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(**inputs, **options, eos_token_id=None)
    whole = model.generate(**inputs, **options, eos_token_id=None, use_cache=False)
    assert torch.equal(cached.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(whole.logits), torch.stack(cached.logits), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_all_tokens_is_the_plain_model_and_removal_leaves_nothing(name):
    model, inputs = build("sdpa"), tiny.make_inputs("llava", PROMPTS)
    with torch.no_grad():
        plain = model(**inputs).logits

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = hooks()
    apply_grip(model, selector=name, selector_kwargs=METHODS[name][0], keep_ratio=0.2)
    with torch.no_grad():
        assert not torch.equal(model(**inputs).logits, plain)
        with model.grip.disabled():
            assert torch.equal(model(**inputs).logits, plain)
        with model.grip.budget(keep_ratio=1.0):
            assert torch.equal(model(**inputs).logits, plain)
    remove_grip(model)
    assert hooks() == before
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain)


def test_a_patched_model_can_be_copied_and_pickled():
    model, inputs = build("sdpa"), tiny.make_inputs("llava", PROMPTS)
    apply_grip(model, selector="fastv", num_tokens=5)
    file = io.BytesIO()
    torch.save(model, file)  # before the first call, which leaves hooks of transformers that cannot be pickled
    file.seek(0)
    with torch.no_grad():
        expected = model(**inputs).logits
        for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(twin(**inputs).logits, expected)
            twin.model.language_model.layers[1].self_attn.k_proj.weight.neg_()
            assert not torch.equal(twin(**inputs).logits, expected)
            assert torch.equal(model(**inputs).logits, expected)


def test_gradients_pass():
    model, inputs = build("sdpa"), tiny.make_inputs("llava", PROMPTS)
    apply_grip(model, selector="pyramiddrop", selector_kwargs=METHODS["pyramiddrop"][0], num_tokens=5)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradient = model.model.multi_modal_projector.linear_1.weight.grad
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_a_failed_call_leaves_nothing_behind():
    model, inputs = build("sdpa"), tiny.make_inputs("llava", PROMPTS[:1])
    apply_grip(model, selector="fastv", num_tokens=5)
    with torch.no_grad():
        first = model(**inputs, use_cache=True)
        broken = model.model.language_model.layers[3].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        broken.remove()
        token = first.logits[:, -1:].argmax(-1)
        after = model(input_ids=token, **{CACHE: first[CACHE]}).logits
        again = model(**inputs, use_cache=True)
        assert torch.equal(after, model(input_ids=token, **{CACHE: again[CACHE]}).logits)


def test_one_rule_of_depth():
    """The papers' shares of 32 layers, and nothing gone before the third layer."""
    drops = {name: [drop for _, drop in get_selector(name).stages(32)] for name in METHODS}
    assert drops == {"fastv": [2], "sparsevlm": [3, 7, 16], "pyramiddrop": [8, 16, 24]}
    for depth in (3, 4, 6, 12, 28, 40, 80):
        for name in METHODS:
            stages = get_selector(name).stages(depth)
            assert min(drop for _, drop in stages) >= 2
            assert len({drop for _, drop in stages}) == len(stages) and all(rank <= drop for rank, drop in stages)
    assert get_selector("pyramiddrop").stages(4) == [(2, 2), (3, 3)]
    assert get_selector("fastv").stages(64) == [(3, 4)] and get_selector("fastv", layers=1).stages(64) == [(0, 1)]


def test_drops_move_to_the_same_shares_of_another_depth():
    for name, stages in {
        "fastv": [(5, 6)],
        "sparsevlm": [(5, 6)],
        "pyramiddrop": [(6, 6), (9, 9)],
    }.items():  # of 12 layers, where a model of 4 has [2], [2] and [2, 3]
        moved = AtDepth(get_selector(name), 4)
        assert moved.stages(12) == stages and moved.name == name
        assert moved.stages(4) == get_selector(name).stages(4)
        assert moved.held(144, 16, 12)[stages[0][1] - 1 : stages[0][1] + 1][0] == 144


@pytest.mark.parametrize("name", METHODS)
def test_what_each_layer_holds_is_what_its_cache_holds(name):
    model, inputs = build("sdpa"), tiny.make_inputs("llava", PROMPTS[:1])
    apply_grip(model, selector=AtDepth(get_selector(name, **METHODS[name][0]), DEPTH), num_tokens=3)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True)[CACHE]
    sizes = [layer.keys.shape[-2] for layer in cache.layers]
    texts = inputs["input_ids"].shape[1] - 16
    assert sizes == [texts + held for held in get_selector(name, **METHODS[name][0]).held(16, 3, DEPTH)]
    assert len(set(sizes)) > 1


def test_bad_use_is_refused():
    with pytest.raises(GripError, match="'fastv' drops tokens inside the language model: use it through apply_grip"):
        get_selector("fastv")(one_group())
    with pytest.raises(ConfigError, match="layers must be an integer >= 1, got 0"):
        get_selector("fastv", layers=0)
    with pytest.raises(ConfigError, match=r"depths must rise within \(0, 1\), got \(0.5, 0.2\)"):
        get_selector("pyramiddrop", depths=[0.5, 0.2])
    model = build("sdpa")
    with pytest.raises(UnsupportedModelError, match=r"at layers \[\(8, 9\)\], this model has 5"):
        apply_grip(model, selector="fastv", selector_kwargs={"layers": 9}, num_tokens=4)
